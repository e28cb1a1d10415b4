# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""How much a label token of a row counts in the loss, and the task that the row belongs to.

A row may have `loss_weight`, a number or "balanced", and `task`, a name; without a weight it is 1.
A collator adds them to the batch as `loss_weights` and `task_ids`. "balanced" is one over the mean
number of label tokens of an answer of the row's task, so that an answer of every task counts the
same. It is counted once, before training (training/row_weighting.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .row_fields import AnyRow

WEIGHT, TASK = "loss_weight", "task"
BALANCED = "balanced"
UNKNOWN = -1
"""The id of a task that training does not know."""


@dataclass(frozen=True)
class RowWeights:
    """The tasks of a training run and their balanced weights.

    Attributes:
        tasks: names, by id; "" for rows without a task. Empty where no training row has a weight.
        balanced: the weight of each task whose rows ask for it.
    """

    tasks: tuple[str, ...] = ()
    balanced: Mapping[str, float] = field(default_factory=dict)

    def of_batch(self, rows: Sequence[tuple[AnyRow, str]]) -> dict[str, torch.Tensor]:
        """Return `loss_weights` and `task_ids`, both (batch,), if any row has a weight.

        Args:
            rows: the row of each conversation of the batch, and what errors call it.

        Raises:
            ValueError: a weight cannot be used; the message names the row.
        """
        if not self.tasks and all(row.get(WEIGHT) is None for row, _ in rows):
            return {}
        weights = [self._weight(row, name) for row, name in rows]
        batch = {"loss_weights": torch.tensor(weights, dtype=torch.float32)}
        if self.tasks:
            ids = {name: number for number, name in enumerate(self.tasks)}
            numbers = [ids.get(task_of(row, name), UNKNOWN) for row, name in rows]
            batch["task_ids"] = torch.tensor(numbers)
        return batch

    def _weight(self, row: AnyRow, name: str) -> float:
        weight = checked_weight(row.get(WEIGHT), name)
        if weight != BALANCED:
            return 1.0 if weight is None else float(weight)
        task = task_of(row, name)
        if task not in self.balanced:
            there = ", ".join(map(repr, self.balanced)) or "none"
            raise ValueError(
                f"{name}: its weight is {BALANCED!r}, but no training row of the task {task!r} has "
                f"that weight; tasks with one: {there}. Give a number, or train by VLMoETrainer, "
                "which counts the label tokens."
            )
        return self.balanced[task]


def checked_weight(weight: object, name: str, column: str = WEIGHT) -> float | str | None:
    """Return a weight, or None where there is none.

    Raises:
        ValueError: it is negative, not finite, or neither a number nor "balanced".
    """
    if weight is None:
        return None
    if isinstance(weight, str) and weight == BALANCED:
        return BALANCED
    number = weight if isinstance(weight, int | float) and not isinstance(weight, bool) else -1
    if not math.isfinite(number) or number < 0:
        raise ValueError(
            f"{name}: `{column}` is {weight!r}; allowed: finite numbers of 0 or more, and "
            f"{BALANCED!r}."
        )
    return float(number)


def task_of(row: AnyRow, name: str) -> str:
    """Return the name of a row's task, "" for none; raise `ValueError` if it is no text."""
    task = row.get(TASK)
    if task is None:
        return ""
    if not isinstance(task, str):
        raise ValueError(f"{name}: `{TASK}` is {task!r:.60}; it must be a text.")
    return task
