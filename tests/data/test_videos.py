"""Rows with videos: files and frames, in any source, become the batches of their frames."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from builders import assistant, picture
from PIL import Image
from video_files import gray_levels, video

from vlmoe import VLMoECollator, VLMoEProcessor, load_rows
from vlmoe.data.check import check_rows
from vlmoe.data.collator import VLMoEPromptCollator
from vlmoe.data.conversations import parse_row
from vlmoe.data.long_rows import usable_rows
from vlmoe.data.rows import as_rows
from vlmoe.tasks.table import task_reader

LEVELS = gray_levels(32)
CONTENT = video(LEVELS)
QUESTION = {"type": "text", "text": "what happens?"}


def asked(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, QUESTION]}


ANSWERED = [asked(), {"role": "assistant", "content": [{"type": "video"}]}]


def messages(**sampling: Any) -> list[dict[str, Any]]:
    return [asked({"type": "video", **sampling}), assistant("it is blue")]


def by_hand(levels: list[int], times: list[str]) -> dict[str, Any]:
    """The row in which somebody has taken the frames out."""
    frames = [Image.new("RGB", (64, 48), (level, level, level)) for level in levels]
    parts = [p for time in times for p in ({"type": "text", "text": time}, {"type": "image"})]
    return {"messages": [asked(*parts), assistant("it is blue")], "images": frames}


@pytest.fixture(scope="module")
def collator(processor: VLMoEProcessor) -> VLMoECollator:
    return VLMoECollator(processor)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with a video and its frames as files."""
    (tmp_path / "clip.mp4").write_bytes(CONTENT)
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder: Path, *rows: dict[str, Any]) -> str:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "train.jsonl")


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], **options) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        if name == "pixel_values":  # the codec's rounding
            torch.testing.assert_close(got[name], wanted[name], atol=0.05, rtol=0)
        else:
            assert torch.equal(got[name], wanted[name]), name


def test_a_row_with_a_video_is_the_row_with_its_frames(
    collator: VLMoECollator, folder: Path
) -> None:
    row = {"messages": messages(num_frames=2), "videos": [str(folder / "clip.mp4")]}
    wanted = collator([by_hand([LEVELS[0], LEVELS[16]], ["0.0 s: ", "2.0 s: "])])
    assert_same(collator([row]), wanted)
    bytes_row = {**row, "videos": [{"bytes": CONTENT, "path": None}]}
    assert_same(collator([bytes_row]), wanted)
    assert (wanted["labels"] >= 0).sum() > 3
    prompts = VLMoEPromptCollator(collator.processor)
    assert_same(
        prompts([row]).inputs,
        prompts([by_hand([LEVELS[0], LEVELS[16]], ["0.0 s: ", "2.0 s: "])]).inputs,
    )


@pytest.mark.parametrize("column", ["videos", "video"])
@pytest.mark.parametrize("kind", ["file", "frames"])
def test_load_rows_reads_files_and_frames(
    collator: VLMoECollator, folder: Path, column: str, kind: str
) -> None:
    given: Any = "clip.mp4" if kind == "file" else ["0.png", "1.png"]
    row = {"messages": messages(num_frames=2), column: [given] if column == "videos" else given}
    rows = load_rows(write(folder, row))
    feature = datasets.Video(decode=False)
    if kind == "frames":
        feature = datasets.List(datasets.Image(decode=False))
    assert rows.column_names == ["id", "messages", "images", "videos"]
    assert rows.features["videos"] == datasets.List(feature)
    assert as_rows(rows) is rows
    wanted = by_hand([LEVELS[0], LEVELS[16]], ["0.0 s: ", "2.0 s: "])
    if kind == "frames":
        wanted = by_hand([0, 0], ["frame 1: ", "frame 2: "]) | {"images": [picture(0), picture(1)]}
    assert_same(collator([rows[0]]), collator([wanted]))


def test_undecoded_video_columns_are_read(collator: VLMoECollator, folder: Path) -> None:
    wanted = collator([by_hand([LEVELS[0]], ["0.0 s: "])])
    stored = {"bytes": CONTENT, "path": None}
    file = {"bytes": None, "path": str(folder / "clip.mp4")}
    for decode in (True, False):  # what is decoded would need torchcodec
        video = datasets.Video(decode=decode)
        for entry in (stored, file):
            for column, given, feature in (
                ("video", entry, video),
                ("videos", [entry], datasets.List(video)),
            ):
                made = datasets.Dataset.from_dict(
                    {"messages": [messages(num_frames=1)] * 2, column: [given] * 2}
                )
                rows = as_rows(made.cast_column(column, feature))
                assert rows.features["videos"] == datasets.List(datasets.Video(decode=False))
                assert_same(collator([rows[1]]), wanted)


def test_the_video_task_reads_its_column(collator: VLMoECollator, folder: Path) -> None:
    row = {"video": "clip.mp4", "question": "what happens?", "answer": "it is blue"}
    source, reader = write(folder, row), task_reader("video-text-to-text")
    levels, times = LEVELS[::4], [f"{time / 2:.1f} s: " for time in range(8)]
    wanted = collator([by_hand(levels, times)])
    assert_same(collator([load_rows(source)[0]]), wanted)
    assert_same(collator([load_rows(source, task="video-text-to-text")[0]]), wanted)
    given = {**row, "video": str(folder / "clip.mp4")}
    assert_same(collator(as_rows([given], reader=reader)), wanted)


def test_images_and_videos_of_a_row_keep_their_order(collator: VLMoECollator, folder: Path) -> None:
    parts = [{"type": "image"}, {"type": "video", "fps": 1, "num_frames": 2}, {"type": "image"}]
    row = {
        "messages": [[asked(*parts), assistant("a")], [asked(*parts), assistant("b")]],
        "images": [picture(0), picture(1)],
        "videos": [[picture(2), picture(3), picture(4), picture(5)]],
    }
    frames = [{"type": "text", "text": "0.0 s: "}, {"type": "image"}]
    frames += [{"type": "text", "text": "2.0 s: "}, {"type": "image"}]
    wanted = {
        "messages": [
            [asked(parts[0], *frames, parts[2]), assistant(answer)] for answer in ("a", "b")
        ],
        "images": [picture(seed) for seed in (0, 2, 4, 1)],
    }
    assert_same(collator([row]), collator([wanted]))
    other = [asked(*parts[::-1][:1], *parts[:2]), assistant("b")]
    with pytest.raises(ValueError, match=r"row 'x'.*different orders"):
        collator([{**row, "id": "x", "messages": [row["messages"][0], other]}])


def test_frames_of_rows_are_one_tile(tiny_config, tokenizer) -> None:
    processor = VLMoEProcessor.for_config(tiny_config(), tokenizer, tiling=True)
    wide = picture(3, (64, 32))
    row = {"messages": messages(), "videos": [[wide, wide]]}
    batch = VLMoECollator(processor)([row])
    assert int(batch["mm_token_type_ids"].sum()) == 2 * processor.image_seq_len
    assert batch["pixel_values"].shape[-4] <= 2
    both = {
        "messages": [asked({"type": "image"}, {"type": "video"}), assistant("a")],
        "images": [wide],
        "videos": [[wide]],
    }
    collated = VLMoECollator(processor)([both])
    length = int(collated["attention_mask"].sum())
    fits = usable_rows([both], VLMoECollator(processor, length), progress=False)
    assert len(fits.rows) == 1
    with pytest.raises(ValueError, match=rf"has {length} tokens, more than"):
        usable_rows([both], VLMoECollator(processor, length - 1), progress=False)
    report = check_rows([both], VLMoECollator(processor), progress=False)
    assert (report.lengths, report.faults) == ([length], [])


def test_long_rows_of_videos_are_measured_with_their_frames(
    processor: VLMoEProcessor, folder: Path
) -> None:
    rows = load_rows(write(folder, {"messages": messages(num_frames=3), "video": "clip.mp4"}))
    length = int(VLMoECollator(processor)([rows[0]])["attention_mask"].sum())
    assert usable_rows(rows, VLMoECollator(processor, length), progress=False).dropped == 0
    with pytest.raises(ValueError, match=rf"has {length} tokens, more than"):
        usable_rows(rows, VLMoECollator(processor, length - 1), progress=False)


def test_without_images_nothing_of_a_video_is_left(folder: Path) -> None:
    source = write(folder, {"messages": messages(), "video": "clip.mp4"})
    (row,) = load_rows(source, with_images=False)
    parsed = parse_row(row, 0)
    assert parsed.conversations[0][0].parts == ("what happens?",)
    with pytest.raises(ValueError, match="has videos, of which altered copies are not made"):
        load_rows(source, altered_copies=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"videos": []}, r"1 video parts, but the row has 0 videos"),
        ({"videos": 7}, r"video 0: got int 7. Allowed: file path"),
        ({"videos": [b""]}, r"video 0: the video of 0 bytes.*0 bytes"),
        ({"videos": [b"nothing"]}, r"video 0: the video of 7 bytes cannot be decoded"),
        ({"videos": [[]]}, r"video 0 has no frames"),
        ({"videos": ["https://a.org/b.mp4"]}, r"video 0: .* data do not make requests"),
        ({"videos": [["https://a.org/b.png"]]}, r"image 0: .* data do not make requests"),
        ({"videos": [CONTENT], "messages": messages(num_frames=0)}, r"`num_frames` is 0"),
        ({"videos": [CONTENT], "messages": messages(frames=2)}, r"'frames', which is not read"),
        ({"videos": [CONTENT], "messages": ANSWERED}, r"an assistant turn holds a video"),
    ],
)
def test_a_video_that_cannot_be_used_is_one_error_that_names_the_row(
    collator: VLMoECollator, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^row 'seven'.*{message}"):
        collator([{"id": "seven", "messages": messages(), **row}])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("../outside.mp4", r"row 0, video 0: .*outside the dataset's folder"),
        (["../outside.mp4"], r"row 0, video 0, frame 0: .*outside the dataset's folder"),
        ("nowhere.mp4", r"row 0, video 0: there is no .*nowhere.mp4"),
        ("https://a.org/b.mp4", r"row 0, video 0: .*data do not make requests"),
    ],
)
def test_files_that_rows_name_follow_the_rules_of_images(
    folder: Path, given: Any, message: str
) -> None:
    data = folder / "data"
    data.mkdir()
    (folder / "outside.mp4").write_bytes(CONTENT)
    source = write(data, {"messages": messages(), "video": given})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_rows(source)
    if "outside" in str(given):
        assert len(load_rows(source, allow_outside_images=True)) == 1


def test_rows_of_files_and_rows_of_frames_are_two_datasets(folder: Path) -> None:
    made = datasets.Dataset.from_list(
        [{"messages": messages(), "videos": [["0.png"]]}, {"messages": messages(), "videos": []}]
    )
    assert len(as_rows(made.select([1]))) == 1
    faults: list[str] = []
    write(folder, {"messages": messages(), "video": "nowhere.mp4"})
    load_rows(str(folder), faults=faults)
    assert len(faults) == 1 and "nowhere.mp4" in faults[0]
