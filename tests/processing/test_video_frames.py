"""Videos of chats: which frames, which words before them, what is refused."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import load_video
from video_files import gray_levels, video

from vlmoe import VLMoEProcessor
from vlmoe.processing.image_sources import DEFAULT_LIMITS, ImageLimits
from vlmoe.processing.video_frames import VideoReader

LEVELS = gray_levels(32)
READER = VideoReader("{time}: ", DEFAULT_LIMITS)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds at eight frames a second."""
    path = tmp_path_factory.mktemp("videos") / "gray.mp4"
    path.write_bytes(video(LEVELS))
    return path


def chat(*videos: Any, **options: Any) -> list[dict[str, Any]]:
    parts = [{"type": "video", "video": each, **options} for each in videos]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what happens?"}]}]


def encode(processor: VLMoEProcessor, messages: list, **options: Any) -> dict[str, Any]:
    wanted = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **wanted, **options)


def levels(frames: list[tuple[str, Any]]) -> list[int]:
    return [int(np.asarray(frame.image).mean().round()) for _, frame in frames]


@pytest.mark.parametrize("sampling", [{"num_frames": 4}, {"num_frames": 7}, {"fps": 2}, {}])
def test_the_frames_of_a_file_are_those_that_transformers_takes(
    mp4: Path, sampling: dict[str, int]
) -> None:
    frames = READER.frames(mp4, "a video", **sampling)
    pixels, metadata = load_video(str(mp4), backend="pyav", **(sampling or {"num_frames": 8}))
    got = np.stack([np.asarray(frame.image) for _, frame in frames])
    assert np.array_equal(got, pixels)
    assert [text for text, _ in frames] == [f"{time:.1f} s: " for time in metadata.timestamps]


@pytest.mark.parametrize("container", ["matroska", "gif"])
def test_files_that_do_not_state_their_length_are_sampled_evenly_too(
    mp4: Path, container: str
) -> None:
    frames = READER.frames(video(LEVELS, container=container), "a video", num_frames=4)
    assert len(frames) == 4
    np.testing.assert_allclose(levels(frames), LEVELS[::8], atol=20)  # 8-bit palette of a GIF


def test_a_short_file_gives_all_its_frames(mp4: Path) -> None:
    assert len(READER.frames(video(LEVELS[:3]), "a video")) == 3
    assert len(READER.frames(video(LEVELS[:3]), "a video", fps=0.1)) == 1
    both = READER.frames(mp4, "a video", num_frames=3, fps=2)
    assert [text for text, _ in both] == ["0.0 s: ", "1.2 s: ", "2.6 s: "]


def test_every_kind_of_source_gives_the_same_frames(mp4: Path) -> None:
    content = mp4.read_bytes()
    reference = levels(READER.frames(str(mp4), "a video"))
    for source in (
        content,
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(mp4)},
        "data:video/mp4;base64," + base64.b64encode(content).decode(),
    ):
        assert levels(READER.frames(source, "a video")) == reference


def test_a_turned_video_is_upright() -> None:
    """Phones store the rotation in the track's header, as cameras do in EXIF."""
    content = bytearray(video([0, 0], size=(64, 48)))
    matrix = content.index(b"tkhd") + 4 + 40
    quarter = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30], ">i4")
    content[matrix : matrix + 36] = quarter.tobytes()
    (_, frame), _ = READER.frames(bytes(content), "a video")
    assert frame.image.size == (48, 64)


def test_a_video_of_a_chat_is_markers_and_images(processor: VLMoEProcessor, mp4: Path) -> None:
    frames = READER.frames(mp4, "a video", num_frames=2)
    parts = [
        each
        for text, frame in frames
        for each in ({"type": "text", "text": text}, {"type": "image", "image": frame.image})
    ]
    by_hand = [{"role": "user", "content": [*parts, {"type": "text", "text": "what happens?"}]}]
    reference = encode(processor, by_hand)
    assert "0.0 s: <image>" in processor.apply_chat_template(by_hand)
    ways = {
        "of the part": encode(processor, chat(str(mp4), num_frames=2)),
        "of the call": encode(processor, chat(str(mp4)), num_frames=2),
        "of its processor": encode(processor, chat(mp4), processor_kwargs={"num_frames": 2}),
    }
    for way, got in ways.items():
        assert got.keys() == reference.keys()
        assert all(torch.equal(got[name], reference[name]) for name in reference), way
    assert processor.apply_chat_template(chat(mp4, num_frames=2)) == (
        processor.apply_chat_template(by_hand)
    )


def test_conversations_of_a_batch_have_their_own_videos(
    processor: VLMoEProcessor, mp4: Path, make_image: Callable[..., Image.Image]
) -> None:
    still = [{"role": "user", "content": [{"type": "image", "image": make_image(1)}]}]
    batch = [chat(mp4, num_frames=3), still, [{"role": "user", "content": "none"}]]
    got = encode(processor, batch, padding=True)
    assert got["pixel_values"].shape[:2] == (3, 3)
    alone = encode(processor, batch[0])
    assert torch.equal(got["pixel_values"][0], alone["pixel_values"][0])
    assert batch[0] == chat(mp4, num_frames=3)  # the caller's chat stays


@pytest.mark.parametrize("form", ["list", "array", "channels first", "files"])
def test_frames_without_a_rate_are_numbered_and_with_one_timed(
    processor: VLMoEProcessor, make_image: Callable[..., Image.Image], tmp_path: Path, form: str
) -> None:
    pictures = [make_image(seed) for seed in range(4)]
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    source = {
        "list": pictures,
        "array": arrays,
        "channels first": torch.from_numpy(arrays).permute(0, 3, 1, 2),
        "files": [str(tmp_path / f"{number}.png") for number in range(4)],
    }[form]
    numbered = [text for text, _ in READER.frames(source, "a video")]
    assert numbered == ["frame 1: ", "frame 2: ", "frame 3: ", "frame 4: "]
    timed = READER.frames(source, "a video", num_frames=2, fps=4)
    assert [text for text, _ in timed] == ["0.0 s: ", "0.5 s: "]
    pixels = encode(processor, chat(source, num_frames=2))["pixel_values"]
    reference = processor(images=[[pictures[0], pictures[2]]], text=["<image><image>"])
    assert torch.equal(pixels, torch.as_tensor(reference["pixel_values"]))


def test_frames_are_not_cut_into_tiles_but_images_beside_them_are(
    processor: VLMoEProcessor, make_image: Callable[..., Image.Image]
) -> None:
    wide = make_image(3, (64, 32))
    messages = chat([wide, wide])
    messages[0]["content"].append({"type": "image", "image": wide})
    got = encode(processor, messages, do_image_splitting=True)
    whole = encode(processor, [{"role": "user", "content": messages[0]["content"][2:]}])
    tiles = encode(
        processor,
        [{"role": "user", "content": messages[0]["content"][2:]}],
        do_image_splitting=True,
    )["pixel_values"]
    assert tiles.shape[1] > 1
    assert got["pixel_values"].shape[1] == 2 + tiles.shape[1]
    assert torch.equal(got["pixel_values"][0, 2:], tiles[0])
    assert torch.equal(got["pixel_values"][0, 0], whole["pixel_values"][0, 0])
    assert torch.equal(got["pixel_values"][0, 1], whole["pixel_values"][0, 0])


def test_the_words_before_frames_are_saved(processor: VLMoEProcessor, tmp_path: Path) -> None:
    assert processor.frame_text == "{time}: "
    own = VLMoEProcessor(
        processor.image_processor,
        processor.tokenizer,
        image_seq_len=processor.image_seq_len,
        frame_text="[{number}, {clock}, {time}] ",
    )
    own.save_pretrained(tmp_path)
    loaded = VLMoEProcessor.from_pretrained(tmp_path)
    frames = loaded.video_reader.frames([Image.new("RGB", (4, 4))] * 2, "a video", fps=0.01)
    assert [text for text, _ in frames] == ["[1, 00:00, 0.0 s] ", "[2, 01:40, 100.0 s] "]
    with pytest.raises(ValueError, match=r"a video.*clock.*names its time; give .* fps"):
        loaded.video_reader.frames([Image.new("RGB", (4, 4))], "a video")


def truncated(content: bytes) -> bytes:
    """Lose the data's end, but not the index, which comes last in a plain MP4."""
    start = content.index(b"mdat") + 4
    end = content.index(b"moov") - 4
    kept = start + (end - start) // 4
    return content[:kept] + bytes(end - kept) + content[end:]


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n"
JOINED = b"ffconcat version 1.0\nfile other.mp4\n"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (b"", {}, r"0 bytes"),
        (b"no video at all", {}, r"the video of 15 bytes cannot be decoded"),
        (PLAYLIST, {}, r"cannot be decoded"),
        (JOINED, {}, r"cannot be decoded"),
        (video(LEVELS)[:-200], {}, r"cannot be decoded|truncated"),
        (truncated(video(gray_levels(32), size=(320, 240))), {}, r"truncated"),
        ("nowhere.mp4", {}, r"neither an existing file"),
        ("https://example.org/a.mp4", {}, r"is a URL, and data do not make requests"),
        ("rtsp://example.org/a", {}, r"a kind that is not opened"),
        ([], {}, r"has no frames"),
        (np.zeros((4, 4, 3), np.uint8), {}, r"shape \(4, 4, 3\) is no video"),
        (None, {}, r"has the keys type; allowed"),
        (7, {}, r"got int 7"),
        (video(LEVELS), {"num_frames": 0}, r"`num_frames` is 0"),
        (video(LEVELS), {"num_frames": 2.5}, r"`num_frames` is 2.5"),
        (video(LEVELS), {"fps": float("nan")}, r"`fps` is nan"),
        (video(LEVELS), {"fps": -1}, r"`fps` is -1"),
        (video(LEVELS), {"nframes": 2}, r"nframes; allowed: .*path.* num_frames and fps"),
    ],
)
def test_what_cannot_be_used_is_one_error_that_names_the_video(
    source: Any, options: dict[str, Any], message: str
) -> None:
    good, bad = chat([Image.new("RGB", (4, 4))]), chat(source, **options)
    with pytest.raises(ValueError, match=rf"^sample 1, video 1.*{message}"):
        READER.in_chats([good, good + bad], {})


def test_a_playlist_does_not_open_the_files_that_it_names(tmp_path: Path) -> None:
    """FFmpeg would: it reads a file's kind from its content."""
    (tmp_path / "other.mp4").write_bytes(video(LEVELS))
    for name, content in (("list.m3u8", PLAYLIST), ("list.ffconcat", JOINED)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be decoded"):
            READER.frames(tmp_path / name, "a video")


def test_limits_hold_before_a_frame_is_decoded(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ImageLimits(max_pixels=64 * 48)
    assert len(VideoReader("", small).frames(mp4, "a video", num_frames=4)) == 4
    monkeypatch.setattr("av.container.InputContainer.decode", None, raising=False)
    with pytest.raises(ValueError, match=r"5 frames of 64x48 pixels are more than 12,288"):
        VideoReader("", small).frames(mp4, "a video", num_frames=5)
    with pytest.raises(ValueError, match=r"64x48 pixels; the limit is .*63 a side"):
        VideoReader("", ImageLimits(max_side=63)).frames(mp4, "a video")


def test_a_video_beside_the_chat_is_refused_with_the_way_to_give_it(
    processor: VLMoEProcessor, mp4: Path
) -> None:
    with pytest.raises(ValueError, match="give a video as a part of a chat"):
        processor(text=["<image>"], videos=[str(mp4)])


def test_without_pyav_the_error_names_the_extra(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"vlmoe\[video\]"):
        READER.frames(mp4, "a video")
