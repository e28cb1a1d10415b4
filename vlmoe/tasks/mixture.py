# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Rows of several sources, each with its task and weight, as one dataset.

[{"source": "captions.json", "task": "image-captioning", "weight": 1},
 {"source": "counts.json", "weight": "balanced"}]
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, Self, TypedDict, TypeGuard

from ..data.row_fields import AnyRow, Rows, did_you_mean
from ..data.row_weights import TASK, WEIGHT, checked_weight
from ..hub.provenance import dataset_name


class DataSource(TypedDict):
    """One of several sources.

    source, split, task, prompt: as for `load_rows`. weight: how much a label token counts, a number
    of 0 or more, or "balanced"; 1 where other sources have a weight.
    """

    source: str
    split: NotRequired[str]
    task: NotRequired[str]
    prompt: NotRequired[str]
    weight: NotRequired[float | Literal["balanced"]]


KEYS = tuple(DataSource.__annotations__)
_OF_ROWS = {"messages", "conversations", "question", "answer", "completion", "text", "image"}


class MixedRows(Sequence[AnyRow]):
    """Rows of several datasets, one dataset after the other; nothing is copied.

    Args:
        parts: the datasets.
        columns: for each of them what its rows get beside their own columns.
        names: for each of them what stands before the `id` of its rows.
        order: the part and the number in it of each row; by default all.
    """

    def __init__(
        self,
        parts: Sequence[Rows],
        columns: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        order: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.parts, self.columns, self.names = parts, columns, names
        every = ((n, i) for n, rows in enumerate(parts) for i in range(len(rows)))
        self.order = list(every if order is None else order)
        self.has_weights = any(WEIGHT in each for each in columns)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.order)

    def __getitem__(self, position: int) -> AnyRow:  # type: ignore[override]
        """Return a row; not a slice."""
        part, number = self.order[position]
        row: AnyRow = self.parts[part][number]
        return {**row, **self.columns[part], "id": f"{self.names[part]}: {row.get('id', number)}"}

    def select(self, positions: Sequence[int]) -> Self:
        """Return the rows at these positions."""
        order = [self.order[position] for position in positions]
        return type(self)(self.parts, self.columns, self.names, order)


def is_mixture(given: object) -> TypeGuard[Sequence[DataSource]]:
    """Return whether it is a list of sources, not of rows."""
    return (
        isinstance(given, list | tuple)
        and bool(given)
        and all(
            isinstance(each, Mapping)
            and isinstance(each.get("source"), str)
            and not _OF_ROWS & each.keys()
            for each in given
        )
    )


def checked_sources(given: Sequence[DataSource]) -> list[DataSource]:
    """Return the sources.

    Raises:
        ValueError: there are none, one has no `source` or an unknown key, or its weight is negative
            or not finite; the message names it by its number.
    """
    if not given:
        raise ValueError("`dataset` is an empty list; it needs at least one source.")
    for number, each in enumerate(given):
        name = f"dataset[{number}]"
        if not isinstance(each, Mapping) or not isinstance(each.get("source"), str):
            raise ValueError(
                f"{name} is {each!r:.80}; it must be a mapping with a `source`. Its keys are "
                f"{', '.join(KEYS)}."
            )
        for key in each:
            if key not in KEYS:
                raise ValueError(
                    f"{name} ({each['source']}) has the key {key!r}"
                    f"{did_you_mean(str(key), KEYS)}; allowed: {', '.join(KEYS)}."
                )
        checked_weight(each.get("weight"), f"{name} ({each['source']})", "weight")
    return list(given)


def mixed_rows(sources: Sequence[DataSource], rows: Sequence[Rows]) -> MixedRows:
    """Join the rows that were loaded from the sources; see `load_rows`.

    A row's `task` is that of its source, by default the source's name. Where one of the sources has
    a weight, every row has a `loss_weight`.
    """
    weighted = any(each.get("weight") is not None for each in sources)
    names = [str(dataset_name(each["source"])[0]) for each in sources]
    columns: list[dict[str, Any]] = []
    for each, name in zip(sources, names, strict=True):
        weight = 1.0 if (given := each.get("weight")) is None else given
        columns.append({TASK: each.get("task") or name} | ({WEIGHT: weight} if weighted else {}))
    return MixedRows(rows, columns, names)
