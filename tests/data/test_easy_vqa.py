"""The easy-VQA rows against the package's own lists."""

import logging
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vlmoe.data.easy_vqa import (
    CAPTION_REQUEST,
    COLORS,
    SHAPES,
    caption_rows,
    derive_color_and_shape,
    question_rows,
    question_type,
)

easy_vqa = pytest.importorskip("easy_vqa")


def source(split: str) -> list[tuple[str, str, int]]:
    return list(zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True))


def test_types_partition_all_questions_by_their_answers() -> None:
    questions = source("train") + source("test")
    kinds = Counter()
    for question, answer, _ in questions:
        by_answer = "shape" if answer in SHAPES else "color" if answer in COLORS else "yes/no"
        assert question_type(question) == by_answer
        kinds[by_answer] += 1
    assert kinds == {"shape": 6259, "color": 6446, "yes/no": 35543}
    assert sum(kinds.values()) == 48248


def test_question_of_another_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="not an easy-VQA question: 'how many shapes"):
        question_type("how many shapes are there?")


@pytest.mark.parametrize(("split", "images"), [("train", 4000), ("test", 1000)])
def test_rows_hold_every_question_once_with_its_image(split: str, images: int) -> None:
    rows = question_rows(split)
    assert len(rows) == images
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    found = []
    for row in rows:
        image_id = int(row["id"].removeprefix(f"easy_vqa/{split}/"))
        with open(paths[image_id], "rb") as file:
            assert row["images"] == [{"bytes": file.read(), "path": None}]
        for (user, assistant), kind in zip(row["messages"], row["question_type"], strict=True):
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            assert [part["type"] for part in user["content"]] == ["image", "text"]
            question = user["content"][1]["text"]
            assert kind == question_type(question)
            found.append((question, assistant["content"][0]["text"], image_id))
    assert sorted(found) == sorted(source(split))


DERIVATIONS = [
    ([("what is the blue shape?", "circle")], ("blue", "circle")),
    ([("what color is the circle?", "red")], ("red", "circle")),
    ([("what is the color of the triangle?", "teal")], ("teal", "triangle")),
    ([("what color is the shape?", "gray")], ("gray", None)),
    ([("what shape does the image contain?", "rectangle")], (None, "rectangle")),
    ([("is there a red shape?", "yes")], ("red", None)),
    ([("is there a red shape?", "no")], (None, None)),
    ([("is there not a red shape?", "no")], ("red", None)),
    ([("does the image not contain a circle?", "no")], (None, "circle")),
    ([("is no circle present?", "no")], (None, "circle")),
    ([("is no circle present?", "yes"), ("is a triangle present?", "no")], (None, "rectangle")),
    (
        [(f"is a {color} shape present?", "no") for color in sorted(COLORS - {"teal"})],
        ("teal", None),
    ),
    ([], (None, None)),
]


@pytest.mark.parametrize(("questions", "expected"), DERIVATIONS)
def test_color_and_shape_follow_from_the_answers(
    questions: list[tuple[str, str]], expected: tuple[str | None, str | None]
) -> None:
    assert derive_color_and_shape(questions) == expected


def test_contradicting_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="contradict each other"):
        derive_color_and_shape(
            [("is there a red shape?", "yes"), ("is a red shape present?", "no")]
        )


@pytest.mark.parametrize(("split", "kept", "left_out"), [("train", 3578, 422), ("test", 888, 112)])
def test_captions_agree_with_the_questions_of_their_image(
    split: str, kept: int, left_out: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="vlmoe.data.easy_vqa"):
        rows = caption_rows(split)
    assert f"determine {kept} images; {left_out} are left out" in caplog.text
    assert len(rows) == kept
    answers: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image_id in source(split):
        answers.setdefault(image_id, []).append((question, answer))
    for row in rows:
        ((user, assistant),) = row["messages"]
        assert user["content"][1]["text"] == CAPTION_REQUEST == "describe the image."
        article, color, shape = assistant["content"][0]["text"].split(" ")
        assert article == "a"
        assert color in COLORS and shape in SHAPES
        for question, answer in answers[int(row["id"].rpartition("/")[2])]:
            kind = question_type(question)
            if kind != "yes/no":
                assert answer == (color if kind == "color" else shape)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="easy_vqa has no split 'validation'; it has: train, test"):
        question_rows("validation")


def test_pictures_are_not_replaced_by_files_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [question_rows("test")[0]["images"], caption_rows("test")[0]["images"]]
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    monkeypatch.chdir(tmp_path)
    assert [question_rows("test")[0]["images"], caption_rows("test")[0]["images"]] == wanted
    assert all(image["bytes"] for images in wanted for image in images)
