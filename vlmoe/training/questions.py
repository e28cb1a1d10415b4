# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The questions of rows, each with all the answers that its row gives."""

from collections.abc import Iterator, Sequence

from torch.utils.data import Dataset
from transformers.utils import logging

from ..data.conversations import Conversation, parse_messages, row_name, split_reference
from ..data.row_fields import AnyRow, did_you_mean
from ..data.rows import ConversationRows
from ..tasks.class_metrics import normalize_answer


class Questions(Dataset):
    """Conversations of rows; with `joined` those of a row that ask the same are one question.

    Args:
        rows: every conversation ends with the assistant's turn.
        joined: whether answers to the same question are its references.

    Attributes:
        references: of each question.
        names: what errors call the row of each question.

    Raises:
        ValueError: a row is malformed, or a conversation ends with another turn.
    """

    def __init__(self, rows: ConversationRows, *, joined: bool) -> None:
        self.rows = rows
        self.positions: list[int] = []
        self.references: list[list[str]] = []
        self.names: list[str] = []
        number, asked = -1, dict[Conversation, int]()
        texts = rows.texts()
        for position in range(len(texts)):
            row = texts[position]
            name = row_name(row, position)
            [conversation] = parse_messages(row, name)
            prompt, reference = split_reference(conversation, name)
            if not joined or number != rows.row_number(position):
                number, asked = rows.row_number(position), {}
            if prompt in asked:
                self.references[asked[prompt]].append(reference)
                continue
            asked[prompt] = len(self.positions)
            self.positions.append(position)
            self.references.append([reference])
            self.names.append(name)

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.positions)

    def __getitem__(self, number: int) -> AnyRow:
        """Return the row of a question, with one conversation."""
        return self.rows[self.positions[number]]

    def batches(self, size: int, progress: bool) -> Iterator[list[AnyRow]]:
        """Yield lists of `size` rows, the last one shorter, with a progress bar."""
        bar = logging.tqdm(total=len(self), desc="answering", unit="question", disable=not progress)
        with bar:
            for start in range(0, len(self), size):
                stop = min(start + size, len(self))
                yield [self[i] for i in range(start, stop)]
                bar.update(stop - start)

    def require_among(self, labels: Sequence[str]) -> None:
        """Refuse a reference that is none of the labels, and several references.

        Raises:
            ValueError: naming the row, its reference and the nearest label.
        """
        known = {normalize_answer(label) for label in labels}
        for name, references in zip(self.names, self.references, strict=True):
            if len(references) > 1:
                raise ValueError(
                    f"{name}: with labels a question has one answer; its row has "
                    f"{', '.join(map(repr, references))!s:.200}."
                )
            for reference in references:
                if normalize_answer(reference) not in known:
                    raise ValueError(
                        f"{name}: the answer {reference!r:.80} is none of the labels "
                        f"{', '.join(labels)!s:.200}{did_you_mean(reference, labels)}."
                    )
