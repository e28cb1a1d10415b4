# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A task: how rows of given columns become conversations, and how answers are measured.

Columns are those that datasets of the task have on the Hub and in the folders of `datasets`. Rows
with `messages` are taken as they are.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedTokenizerBase

from ..data.row_fields import IMAGE_COLUMNS, VIDEO_COLUMNS, AnyRow
from ..data.row_formats import Converted, RowFormat, text_parts

MEDIA_COLUMNS = (*IMAGE_COLUMNS, *VIDEO_COLUMNS)
"""Columns that hold pictures and videos; a converter sees their number, not their content."""

Converter = Callable[[AnyRow, int, str, str], Converted]
"""`(row, images, name, prompt) -> (conversations, pictures)`, see `RowFormat`."""
Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], Mapping[str, float]]
"""`(answers, references of each answer) -> figures by name`."""


@dataclass(frozen=True)
class CertainMetric:
    """A metric that also takes how certain the model was of the parts of its answers.

    Attributes:
        scores: `(tokens, log_probabilities, tokenizer)` of an answer -> the scores of its parts.
        measure: `(answers, references of each answer, scores of each answer) -> figures by name`.
        require: raises `ImportError` where a library is missing.
    """

    scores: Callable[[Sequence[int], Sequence[float], PreTrainedTokenizerBase], list[float]]
    measure: Callable[
        [Sequence[str], Sequence[Sequence[str]], Sequence[Sequence[float]]], Mapping[str, float]
    ]
    require: Callable[[], None]


@dataclass(frozen=True)
class Task:
    """What a model is asked to do.

    Attributes:
        name: as on the Hub where it has such a task.
        columns: one entry for each column that a row needs: the names that it may have, of which
            exactly one must be there.
        convert: `(row, images, name, prompt) -> (conversations, pictures)`: takes a row of these
            columns, pictures and videos aside, the number of its images and the row's name for
            errors; returns a list of conversations and the pictures inside them, often none.
        prompt: the instruction by default; "" for none.
        metrics: functions of the answers and their references, beside the exact match.
        max_new_tokens: the longest answer by default, in tokens; None for twice the longest
            reference.
        on_long_rows: what happens to rows that are too long by default, see `VLMoETrainer`. With
            "shorten-prompt" the longest text of the user loses its end.
        optional: columns that are read where they are.
        measures: whether `convert` takes `image_sizes`, see `RowFormat`.
        bound_to_place: whether answers say where things are, so that copies of rows with shifted
            and mirrored pictures would be wrong.
        certain_metric: one more metric, which needs the probabilities of tokens.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    convert: Converter
    prompt: str
    metrics: tuple[Metric, ...] = ()
    max_new_tokens: int | None = 32
    on_long_rows: str = "error"
    optional: tuple[str, ...] = field(default=())
    measures: bool = False
    bound_to_place: bool = False
    certain_metric: CertainMetric | None = None

    def fits(self, columns: Collection[str]) -> bool:
        """Return whether rows with these columns can be read as this task's."""
        return all(any(name in columns for name in names) for names in self.columns)

    def form(self, columns: Collection[str], prompt: str | None, source: str) -> RowFormat:
        """Return the form of rows with these columns.

        Args:
            columns: of the rows, without `messages`.
            prompt: the instruction, by default the task's own.
            source: what an error calls the rows.

        Raises:
            ValueError: a column is missing, or two columns hold the same; the message says which
                columns the task needs.
        """
        fault = self.fault(columns, source)
        if fault is not None:
            raise ValueError(f"{fault}.")
        chosen = [next(name for name in names if name in columns) for names in self.columns]
        chosen += [name for name in self.optional if name in columns]
        return RowFormat(
            f"rows of the task {self.name}",
            tuple(name for name in chosen if name not in MEDIA_COLUMNS),
            partial(_convert, self.convert, self.prompt if prompt is None else prompt),
            self.measures,
        )

    def fault(self, columns: Collection[str], source: str) -> str | None:
        """Return what is wrong with the columns of rows called `source`, if anything is."""
        for names in self.columns:
            found = [name for name in names if name in columns]
            if len(found) == 1 or (found and names == IMAGE_COLUMNS):
                continue
            wrong = f"both {' and '.join(found)}" if found else f"no {' or '.join(names)}"
            needed = " and ".join("/".join(each) for each in self.columns)
            return (
                f"{source} has {wrong}. The task {self.name} needs one each of {needed}; the "
                f"columns are {', '.join(map(str, columns))}"
            )
        return None


def _convert(converter: Converter, prompt: str, row: AnyRow, images: int, name: str) -> Converted:
    """Call a converter with the prompt; texts become parts, as a dataset stores them.

    `datasets` names its cache by a partial of functions.
    """
    conversations, pictures = converter(row, images, name, prompt)
    for message in (message for messages in conversations for message in messages):
        if isinstance(message["content"], str):
            message["content"] = text_parts(message["content"])
    return conversations, pictures
