# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Rows as a user has them in Python, and rows seen one conversation at a time.

`as_rows` takes a list of dicts, a `datasets.Dataset` or what `load_rows` returned, in any form of
`row_formats.py`. Every function of the package that takes rows calls it.
"""

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.utils.data import Dataset

from .conversations import row_name, split_conversations
from .images import ImageSources
from .row_datasets import standard_dataset
from .row_fields import COLUMNS, WEIGHT_COLUMNS, AnyRow, Rows, require_messages
from .row_formats import RowReader, conversational, format_of
from .videos import stored_video

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_READ = ("id", *COLUMNS, *WEIGHT_COLUMNS)


def as_rows(
    rows: "Rows | datasets.Dataset", name: str = "rows", reader: RowReader = format_of
) -> Rows:
    """Convert rows of any form to rows with `messages` and `images`, each with an `id`.

    Relative image paths start at the working directory. Every image file must exist; URLs are left
    to the collator, which refuses them by default. What `load_rows` returned and `ConversationRows`
    come back as they are, and so do other datasets of PyTorch.

    Args:
        rows: a list of rows or a dataset. A row is `{"messages": [...], "images": [...]}`, or
            `{"image": ..., "question": ..., "answer": ...}`, or of another form.
        name: what errors call the rows; a row without an `id` is called `name[number]`.
        reader: the forms of rows that are known; that of a task is `vlmoe.tasks.task_reader`'s.

    Raises:
        ValueError: what was given is no list of rows, or a row has neither `messages` nor another
            known form; the message names the row.
        FileNotFoundError: an image file does not exist.
    """
    if isinstance(rows, str | os.PathLike):
        raise ValueError(f"{name} is the path {str(rows)!r}; read it with load_rows first.")
    if isinstance(rows, Mapping):
        raise ValueError(
            f"{name} is a {type(rows).__name__} with the keys {', '.join(map(str, rows))}; pass a "
            "list of rows, or one split."
        )
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ValueError(
            f"{name} is a {type(rows).__name__}, which has no length; pass a list of rows or a "
            "datasets.Dataset."
        )
    sources = ImageSources(Path.cwd(), (), allow_outside_images=True, allow_image_urls=True)
    if getattr(rows, "column_names", None):
        return standard_dataset(cast("datasets.Dataset", rows), sources, name, reader)
    if not isinstance(rows, list | tuple):
        return rows
    converted = [_converted(row, i, sources, name, reader) for i, row in enumerate(rows)]
    unread = {str(key): None for row in converted for key in row if key not in _READ}
    if unread:
        logger.warning("%s: these columns are not read: %s.", name, ", ".join(unread))
    return converted


def _converted(
    row: Any, position: int, sources: ImageSources, name: str, reader: RowReader
) -> dict[str, Any]:
    """One row of a list, with an `id`, `messages` and `images` whose files exist."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{name}[{position}] is a {type(row).__name__}, not a row (a dict).")
    given = {**row, "id": f"{name}[{position}]" if row.get("id") is None else row["id"]}
    where = row_name(given, position)
    given = dict(conversational(given, where, reader))
    require_messages(given, where)
    images = given.get("images")
    if isinstance(images, list | tuple):
        given["images"] = [
            sources.entry(image, f"{where}, image {i}")
            if isinstance(image, str | os.PathLike | Mapping)
            else image
            for i, image in enumerate(images)
        ]
    if given.get("videos"):
        videos = enumerate(given["videos"])
        given["videos"] = [stored_video(each, sources, f"{where}, video {i}") for i, each in videos]
    return given


class ConversationRows(Dataset):
    """`rows` with one conversation (and question type) per item; nothing is copied.

    A row may hold several conversations about the same images. Evaluation counts conversations, and
    `Trainer` cuts its last batch by the number of samples: both need one conversation per sample.
    Neighbors share their images, which the collator encodes once per batch.

    Example:
        >>> rows = ConversationRows([{"messages": [first, second], "images": [image]}])
        >>> len(rows), rows[1]["messages"] == second
        (2, True)
    """

    def __init__(
        self, rows: "Rows | datasets.Dataset", name: str = "rows", reader: RowReader = format_of
    ) -> None:
        """Take rows as `as_rows` does."""
        self.rows = as_rows(rows, name, reader)
        columns = getattr(self.rows, "column_names", None)
        messages: Sequence[Any] = (
            self.rows["messages"]  # type: ignore[call-overload]
            if columns
            else [self.rows[i].get("messages") for i in range(len(self.rows))]
        )
        self._positions = [
            (index, each)
            for index, entry in enumerate(messages)
            for each in range(len(split_conversations(entry)) if entry else 1)
        ]
        self._last: tuple[int, AnyRow] | None = None

    def texts(self) -> "ConversationRows":
        """Return the same conversations without reading images, where a dataset holds them."""
        texts = copy.copy(self)
        if "images" in getattr(self.rows, "column_names", ()):
            texts.rows = cast("datasets.Dataset", self.rows).remove_columns("images")
        texts._last = None
        return texts

    def row_number(self, position: int) -> int:
        """Return the number of the row that holds a conversation."""
        return self._positions[position][0]

    def __len__(self) -> int:
        """Return the number of conversations."""
        return len(self._positions)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return the row of a conversation, holding this conversation alone."""
        index, each = self._positions[position]
        if self._last is None or self._last[0] != index:
            self._last = (index, self.rows[index])
        row = dict(self._last[1])
        if row.get("messages"):
            row["messages"] = split_conversations(row["messages"])[each]
        if isinstance(row.get("question_type"), (list, tuple)):
            row["question_type"] = row["question_type"][each]
        return row
