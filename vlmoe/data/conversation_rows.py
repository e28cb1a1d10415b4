# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Dataset rows seen one conversation at a time.

A row may hold several conversations about the same images. Evaluation counts conversations, and
`Trainer` cuts its last batch by the number of samples: both need one conversation per sample.
Neighbours share their images, which the collator encodes once per batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from .conversations import row_name, split_conversations
from .row_formats import conversational


class ConversationRows(Dataset):
    """`rows` with one conversation (and question type) per item; nothing is copied.

    Example:
        >>> rows = ConversationRows([{"messages": [first, second], "images": [image]}])
        >>> len(rows), rows[1]["messages"] == second
        (2, True)
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = getattr(rows, "column_names", None)
        if not columns:
            rows = [conversational(row, row_name(row, i)) for i, row in enumerate(rows)]
        messages = rows["messages"] if columns else [row.get("messages") for row in rows]  # type: ignore[call-overload]
        self.rows = rows
        self._positions = [
            (index, each)
            for index, entry in enumerate(messages)
            for each in range(len(split_conversations(entry)) if entry else 1)
        ]
        self._last: tuple[int, Mapping[str, Any]] | None = None

    def __len__(self) -> int:
        """The number of conversations."""
        return len(self._positions)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The row of a conversation, holding this conversation alone."""
        index, each = self._positions[position]
        if self._last is None or self._last[0] != index:
            self._last = (index, self.rows[index])
        row = dict(self._last[1])
        if row["messages"]:
            row["messages"] = split_conversations(row["messages"])[each]
        if isinstance(row.get("question_type"), (list, tuple)):
            row["question_type"] = row["question_type"][each]
        return row
