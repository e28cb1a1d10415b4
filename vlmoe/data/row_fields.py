# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The fields of rows: their types, the names that are read, and errors for names that are not."""

import difflib
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict, TypeGuard

import numpy as np
import torch

from ..processing.image_sources import EncodedImage, ImageSource

COLUMNS = ("messages", "images", "videos", "question_type")
WEIGHT_COLUMNS = ("task", "loss_weight")
"""What `row_weights.py` reads."""
IMAGE_COLUMNS = ("images", "image", "file_name")
VIDEO_COLUMNS = ("videos", "video")
CAPTION_COLUMNS = ("text", "caption")
OTHER_COLUMNS = ("conversations", "prompt", "completion", "question", "answer")
MESSAGE_KEYS = ("role", "content")
LOSS_KEYS = ("weight", "loss", "train")
LEARNED_ROLES = ("assistant", "gpt", "chatgpt", "model")
SIMILAR = 0.8
"""A column this similar to a known one counts as misspelled."""
NEEDED = (
    "Needed are `messages` (conversations) and, for images, `images` (a list of images per row), "
    "or `question` and `answer`, `conversations` (LLaVA, ShareGPT), `prompt` and `completion`, or "
    "`text` beside an image."
)
REMOVED = (
    "If the dataset has these columns, Trainer removed them: set remove_unused_columns=False in "
    "TrainingArguments."
)

AnyRow = Mapping[str, Any]
"""A row of any form; `Row` and `QuestionRow` are the two common ones."""
Rows = Sequence[AnyRow]
"""Anything with a length and rows by number: a list, a `datasets.Dataset`, `ConversationRows`."""
Messages = list[dict[str, Any]]
"""One conversation as a row holds it."""


class StoredImage(TypedDict):
    """An image as an undecoded `datasets.Image` column stores it."""

    bytes: bytes | None
    path: str | None


RowImage = ImageSource
"""An image as a row holds it; a string is a path, base64, a `data:` URL, or, if allowed, a URL."""


RowVideo = EncodedImage | Sequence[RowImage] | np.ndarray | torch.Tensor
"""A video as a row holds it: a file in the forms of an image's, or its frames."""


class Part(TypedDict):
    """A piece of a message: a text, or the place of the row's next image or video."""

    type: Literal["text", "image", "video"]
    text: NotRequired[str | None]
    num_frames: NotRequired[int | None]
    fps: NotRequired[float | None]


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Sequence[Part]


class Row(TypedDict):
    """One conversation, or several about the same images."""

    messages: Sequence[Message] | Sequence[Sequence[Message]]
    images: NotRequired[Sequence[RowImage]]
    videos: NotRequired[Sequence[RowVideo]]
    id: NotRequired[str]
    question_type: NotRequired[str | Sequence[str]]


class QuestionRow(TypedDict):
    """One question about an image, several (`images`) or none, and its answer."""

    question: str
    answer: str
    image: NotRequired[RowImage | None]
    images: NotRequired[Sequence[RowImage]]
    id: NotRequired[str]
    question_type: NotRequired[str]


def require_messages(row: AnyRow, name: str) -> None:
    """Raise `ValueError` for a row without `messages`, and for a misspelled column."""
    require_known_columns(row.keys(), name)
    if "messages" not in row:
        raise ValueError(
            f"{name} has no `messages`; its columns are {sorted(map(str, row))}. {NEEDED} {REMOVED}"
        )


def require_known_columns(columns: Collection[str], name: str, also: tuple[str, ...] = ()) -> None:
    """Raise `ValueError` for a column that is almost a known one, or one of `also`."""
    known = (*also, *COLUMNS)
    if "messages" not in columns:
        known = (*known, *OTHER_COLUMNS, *IMAGE_COLUMNS, *CAPTION_COLUMNS)
    wrong = _misspelled(tuple(columns), known)
    if wrong is not None:
        raise ValueError(
            f"{name}: the column {wrong[0]!r} is not read (did you mean {wrong[1]!r}?); rename or "
            "remove it."
        )


@functools.lru_cache(maxsize=1024)  # all rows of a dataset have the same columns
def _misspelled(given: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the first given name that is almost a known one which is absent, and that one."""
    absent = [name for name in known if name not in given]
    for name in given:
        if name not in known and isinstance(name, str):
            close = difflib.get_close_matches(name.lower(), absent, n=1, cutoff=SIMILAR)
            if close:
                return name, close[0]
    return None


def require_known_keys(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Raise `ValueError` for a key outside `known` that has a value: the value would be lost.

    A turn may say whether it is learned (`weight`, `loss`, `train`), if training does the same.
    """
    learned = given.get("role", given.get("from")) in LEARNED_ROLES
    for key, value in given.items():
        if key in LOSS_KEYS and value in (0, 1) and bool(value) == learned:
            continue
        if key not in known and value is not None:
            raise ValueError(
                f"{what} has the key {key!r}, which is not read{did_you_mean(str(key), known)}; "
                f"its keys are {' and '.join(f'`{each}`' for each in known)}. Remove it."
            )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)`, or nothing if no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Return whether a value is a list in the sense of a row."""
    return isinstance(value, (list, tuple))


def videos_of(row: AnyRow) -> list[Any]:
    """Return the videos in the columns of a row: `videos`, a list, or `video`, one."""
    column = next((name for name in VIDEO_COLUMNS if row.get(name) is not None), None)
    if column is None:
        return []
    value = row[column]
    return list(value) if column == "videos" and is_list(value) else [value]
