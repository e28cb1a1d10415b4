# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Weights of rows in `Trainer`: balanced ones are counted, steps normalized, tasks logged.

The loss of an optimizer step is sum_t w_row(t) ce_t / sum_t w_row(t) over its label tokens, and the
router losses weigh the rows alike (modeling_vlmoe/label_loss.py): the update does not depend on how
the rows are split over micro-batches and ranks. Without weights `Trainer` does what it did.
"""

from collections import defaultdict
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data.collator import VLMoECollator
from ..data.conversations import row_name
from ..data.native_collator import NativeCollator
from ..data.row_fields import Rows
from ..data.row_weights import BALANCED, WEIGHT, RowWeights, checked_weight, task_of
from ..modeling_vlmoe.label_loss import label_counts
from ..routing.routed_layers import is_vlmoe
from .sparse_loss import SparseLoss

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

NO_TASK = "other"
"""The name in the log of rows without a task."""


def count_row_weights(rows: Rows, collator: VLMoECollator | NativeCollator) -> RowWeights:
    """Find the tasks of training rows, and the weight of those that are balanced.

    Args:
        rows: as the trainer has them. Other datasets than lists and those of `load_rows` have
            weights if their first row has one.
        collator: counts the label tokens of balanced rows.

    Raises:
        ValueError: a weight cannot be used; the message names the row.
    """
    if not _has_weights(rows):
        return RowWeights()
    tasks: dict[str, None] = {}
    counts: dict[str, list[int]] = defaultdict(list)
    for position in range(len(rows)):
        row = rows[position]
        name = row_name(row, position)
        tasks[task := task_of(row, name)] = None
        if checked_weight(row.get(WEIGHT), name) == BALANCED:
            counts[task] += collator.answer_lengths(row, position)
    balanced = {task: 1 / max(mean(lengths), 1e-9) for task, lengths in counts.items()}
    return RowWeights(tuple(tasks), balanced)


def _has_weights(rows: Rows) -> bool:
    columns = getattr(rows, "column_names", None)
    if columns is not None:
        return WEIGHT in columns
    if (known := getattr(rows, "has_weights", None)) is not None:
        return bool(known)
    looked_at = rows if isinstance(rows, list | tuple) else [rows[0]] if len(rows) else []
    return any(row.get(WEIGHT) is not None for row in looked_at)


def require_weighable(model: nn.Module, compute_loss_func: object) -> None:
    """Refuse weights for a loss that would not see them.

    Raises:
        ValueError: names the loss.
    """
    if isinstance(compute_loss_func, SparseLoss) or (compute_loss_func is None and is_vlmoe(model)):
        return
    given = f"`compute_loss_func` {compute_loss_func!r:.60}"
    raise ValueError(
        f"Rows have a `{WEIGHT}`, but {type(model).__name__} is trained by "
        f"{'its own loss' if compute_loss_func is None else given}, which does not read it: "
        "weights are for VLMoE, and for sparse models of transformers by SparseLoss."
    )


class RowWeightsMixin(Base):
    """Makes a `Trainer` normalize by the weights of label tokens, and log `loss/<task>`.

    Attributes:
        row_weights: of the training rows; without tasks nothing changes.
    """

    row_weights = RowWeights()
    _task_losses: torch.Tensor | None = None  # (2, tasks): sums over label tokens, their number

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Sum the weights of the step's label tokens, of all ranks."""
        if not any("loss_weights" in batch for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        counts = [label_counts(each["labels"], each.get("loss_weights")) for each in batch_samples]
        total = torch.stack([each.sum().float() for each in counts]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the loss as `Trainer` does, with the weights of the rows."""
        weights, tasks = inputs.get("loss_weights"), inputs.get("task_ids")
        if weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {name: each for name, each in inputs.items() if name != "task_ids"}
        labels, sparse_loss = inputs["labels"], self.compute_loss_func
        if isinstance(sparse_loss, SparseLoss):
            sparse_loss.loss_weights = inputs.pop("loss_weights")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        found = sparse_loss if isinstance(sparse_loss, SparseLoss) else outputs
        if tasks is not None and model.training and found.row_losses is not None:
            self._add_to_tasks(tasks, found.row_losses, label_counts(labels))
        return (loss, outputs) if return_outputs else loss

    def _add_to_tasks(
        self, tasks: torch.Tensor, row_losses: torch.Tensor, counts: torch.Tensor
    ) -> None:
        if self._task_losses is None:
            size = 2, len(self.row_weights.tasks)
            self._task_losses = torch.zeros(size, device=row_losses.device)
        both = torch.stack([row_losses, counts.to(row_losses)])  # (2, batch)
        self._task_losses.index_add_(1, tasks.to(both.device), both)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `loss/<task>` to a training loss: the mean cross-entropy of a label token."""
        if "loss" in logs and self.row_weights.tasks:
            logs |= self._task_means()
        super().log(logs, start_time)

    def _task_means(self) -> dict[str, float]:
        """Return the mean of each task since the last call, over all ranks, and start anew."""
        sums = self._task_losses
        if sums is None:
            sums = torch.zeros(2, len(self.row_weights.tasks), device=self.args.device)
        losses, counts = self.accelerator.reduce(sums).tolist()
        self._task_losses = None
        found = zip(self.row_weights.tasks, losses, counts, strict=True)
        return {f"loss/{task or NO_TASK}": loss / count for task, loss, count in found if count}
