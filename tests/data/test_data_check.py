"""A check of a dataset counts what is there and names every fault."""

from pathlib import Path
from typing import Any

import pytest
from builders import assistant, row, user
from PIL import Image

from vlmoe.data.check import check_rows, plot_data, report_text
from vlmoe.data.collator import IGNORE_INDEX, VLMoECollator
from vlmoe.processing.processing_vlmoe import VLMoEProcessor


def turn(question: str, answer: str | None, images: Any = (), **columns: Any) -> dict[str, Any]:
    replies = [] if answer is None else [assistant(answer)]
    return row(user(question, len(images)), *replies, images=images, **columns)


@pytest.fixture
def rows(make_image: Any) -> list[dict[str, Any]]:
    return [
        turn("what color?", "blue", [make_image(size=(24, 20))], question_type="color"),
        turn("is it red?", "no", question_type="yes/no"),
        turn("and now?", "yes", [make_image(1, size=(9, 7)), make_image(2)], question_type="color"),
    ]


def test_counts_are_those_of_the_collator(
    rows: list[dict[str, Any]], processor: VLMoEProcessor
) -> None:
    collator = VLMoECollator(processor)
    report = check_rows(rows, collator, "train", progress=False)
    batches = [collator([each]) for each in rows]
    assert report.lengths == [batch["input_ids"].shape[1] for batch in batches]
    learned = [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches]
    assert report.label_lengths == learned
    assert report.sizes == [(24, 20), (9, 7), (24, 20)]
    assert report.question_types == {"color": 2, "yes/no": 1}
    assert report.rows == 3 and report.faults == []


def test_the_first_rows_are_shown_with_their_images_and_what_is_learned(
    rows: list[dict[str, Any]], processor: VLMoEProcessor
) -> None:
    report = check_rows(rows * 2, VLMoECollator(processor), "train", progress=False)
    assert len(report.examples) == 3
    tokens = processor.image_seq_len
    expected = f"<|user|>[image 24x20: {tokens} tokens]what color?<|end|><|assistant|>«blue<|end|>»"
    assert report.examples[0].replace(" ", "") == expected.replace(" ", "")


def test_every_fault_is_named_by_row(
    rows: list[dict[str, Any]], processor: VLMoEProcessor, tmp_path: Path, make_image: Any
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    faulty = [
        turn("silent", None, id="a"),
        turn("broken", "x", [str(tmp_path / "broken.png")], id="b"),
        {**turn("lost", "x", [make_image()], id="c"), "images": []},
        turn("long " * 40, "x", id="d"),
        {"messages": [{"role": "user", "content": "a", "nmae": "x"}], "id": "e"},
    ]
    report = check_rows(
        [*rows, *faulty], VLMoECollator(processor), faults=["row 9: gone"], limit=60, progress=False
    )
    assert report.faults[0] == "row 9: gone" and len(report.faults) == 6
    for name, reason, fault in zip(
        "abcde",
        ["no token with a loss", "image 0", "0 images", "more than 60", "'nmae'"],
        report.faults[1:],
        strict=True,
    ):
        assert fault.startswith(f"row '{name}'") and reason in fault
    text = report_text([report], 60)
    assert all(f"- {fault}" in text for fault in report.faults)


def test_the_report_and_the_picture_hold_for_empty_and_for_several_splits(
    rows: list[dict[str, Any]], processor: VLMoEProcessor, tmp_path: Path
) -> None:
    collator = VLMoECollator(processor)
    full = check_rows(rows, collator, "train", progress=False)
    bad = check_rows([turn("a", None)], collator, "test", progress=False)
    text = report_text([full, bad], 128)
    assert "train" in text and "images are 9/24/24 pixels wide" in text
    for reports in ([full], [full, bad], [bad]):
        path = plot_data(reports, tmp_path / "data.png", 20)
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 1000
