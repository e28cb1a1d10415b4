# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""easy-VQA as conversational rows: 5,000 images of one colored shape, 48,248 questions.

The data come from the `easy-vqa` package (https://github.com/vzhou842/easy-VQA, MIT): splits
`train` (4,000 images, 38,575 questions) and `test` (1,000 images, 9,673 questions), 13 answers.

- `question_rows(split)`: a row per image, holding all its questions as conversations.
- `caption_rows(split)`: a row per image, "describe the image." answered "a {color} {shape}". Color
  and shape follow from the image's own questions of that split and from nothing else.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

SPLITS = ("train", "test")
SHAPES = frozenset({"circle", "rectangle", "triangle"})
COLORS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
CAPTION_REQUEST = "describe the image."

_COLOR_QUESTION = re.compile(r"what (color is|is the color of) the (?P<shape>\w+)\?")
_SHAPE_QUESTION = re.compile(r"what (shape\b.*|is the (?P<color>\w+) shape)\?")
_YES_NO_QUESTION = re.compile(r"(is|does)\b.*\?")
_NEGATION = re.compile(r"\b(not|no)\b")


def question_type(question: str) -> str:
    """`"shape"`, `"color"` or `"yes/no"`; `ValueError` for a question that is not easy-VQA's."""
    if _COLOR_QUESTION.fullmatch(question):
        return "color"
    if _SHAPE_QUESTION.fullmatch(question):
        return "shape"
    if _YES_NO_QUESTION.fullmatch(question):
        return "yes/no"
    raise ValueError(f"not an easy-VQA question: {question!r}.")


def question_rows(split: str) -> "Dataset":
    """Return a row per image of a split; its `question_type` has one entry per question."""
    rows = []
    for image_id, path, questions in _images(split):
        rows.append(
            {
                "id": f"easy_vqa/{split}/{image_id}",
                "messages": [conversation(*pair) for pair in questions],
                "images": [{"bytes": path.read_bytes(), "path": None}],
                "question_type": [question_type(question) for question, _ in questions],
            }
        )
    return dataset(rows)


def caption_rows(split: str) -> "Dataset":
    """Return every image of a split whose color and shape its questions determine, with a caption.

    The log says how many images are left out.
    """
    rows, left_out = [], 0
    for image_id, path, questions in _images(split):
        color, shape = derive_color_and_shape(questions)
        if color is None or shape is None:
            left_out += 1
            continue
        rows.append(
            {
                "id": f"easy_vqa_captions/{split}/{image_id}",
                "messages": [conversation(CAPTION_REQUEST, f"a {color} {shape}")],
                "images": [{"bytes": path.read_bytes(), "path": None}],
                "question_type": ["caption"],
            }
        )
    logger.info(
        "easy_vqa_captions: the %s questions determine %d images; %d are left out.",
        split,
        len(rows),
        left_out,
    )
    return dataset(rows)


def derive_color_and_shape(
    questions: Iterable[tuple[str, str]],
) -> tuple[str | None, str | None]:
    """Derive color and shape of an image from questions and answers; None if they do not say.

    Direct answers ("what is the blue shape?", "rectangle"), confirmations ("is there a red shape?",
    "yes"; "is there not a red shape?", "no") and exclusion of all other possibilities count.
    Raises `ValueError` naming the questions if they contradict each other.
    """
    pairs = list(questions)
    colors, shapes = set(COLORS), set(SHAPES)
    for question, answer in pairs:
        stated = set(re.findall(r"\w+", question))
        if question_type(question) == "yes/no":
            present = (answer == "yes") != bool(_NEGATION.search(question))
            _narrow(colors, stated & COLORS, present)
            _narrow(shapes, stated & SHAPES, present)
        else:
            stated.add(answer)
            _narrow(colors, stated & COLORS, True)
            _narrow(shapes, stated & SHAPES, True)
    if not colors or not shapes:
        raise ValueError(f"the answers contradict each other: {pairs}.")
    return (
        colors.pop() if len(colors) == 1 else None,
        shapes.pop() if len(shapes) == 1 else None,
    )


def _narrow(candidates: set[str], named: set[str], present: bool) -> None:
    """Keep only what is named and present, or drop what is named and absent."""
    if named and present:
        candidates &= named
    else:
        candidates -= named


def _images(split: str) -> list[tuple[int, Path, list[tuple[str, str]]]]:
    """(image number, file, its questions and answers) for a split, by image number."""
    if split not in SPLITS:
        raise ValueError(f"easy_vqa has no split {split!r}; it has: {', '.join(SPLITS)}.")
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError('easy-VQA needs its package: pip install "vlmoe[demo]".') from error
    if split == "train":
        data, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    else:
        data, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    questions = defaultdict(list)
    for question, answer, image_id in zip(*data, strict=True):
        questions[image_id].append((question, answer))
    return [
        (image_id, Path(paths[image_id]), questions[image_id]) for image_id in sorted(questions)
    ]


def conversation(question: str, answer: str) -> list[dict[str, Any]]:
    """One question about the image, with its answer."""
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def dataset(rows: list[dict[str, Any]]) -> "Dataset":
    """Make a dataset of rows with id, messages, images (left encoded) and question_type."""
    from datasets import Dataset

    return Dataset.from_list(rows, features=_features())


def _features() -> "Features":
    """Return the columns of the rows."""
    from datasets import Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part)}
    return Features(
        {
            "id": Value("string"),
            "messages": List(List(message)),
            "images": List(Image(decode=False)),
            "question_type": List(Value("string")),
        }
    )
