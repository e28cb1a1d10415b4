# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Cross-entropy of the label tokens, and the share of each row in the loss.

With `loss_weights` w (batch,), one for each row, a label token counts w times:

    loss = sum_t w_row(t) ce_t / sum_t w_row(t)

The denominator is over all label tokens of the optimizer step, so that the update does not depend
on how its rows are split over micro-batches and ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .input_checks import check_labels

IGNORED = -100


@dataclass
class LabelLoss:
    """The cross-entropy of a micro-batch.

    Attributes:
        loss: its part of the optimizer step's loss, a scalar.
        row_shares: (batch,), the share of each row in the optimizer step's loss.
        row_losses: (batch,), the sum over each row's label tokens, without weights and gradient;
            None without `loss_weights`.
    """

    loss: torch.Tensor
    row_shares: torch.Tensor
    row_losses: torch.Tensor | None = None


def label_loss(
    loss_function: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | float | None = None,
    loss_weights: torch.Tensor | None = None,
    **kwargs: Any,
) -> LabelLoss:
    """Compute the loss of one micro-batch; 0 without any label token.

    Args:
        loss_function: of the model; not called with `loss_weights`, as it sums over rows.
        logits: (batch, length, vocabulary).
        labels: (batch, length) token ids; -100 where there is no loss.
        num_items_in_batch: label tokens of the whole optimizer step, on all ranks, each counted
            with its row's weight; by default those of `labels`.
        loss_weights: (batch,), 0 or more.
        **kwargs: for `loss_function`.

    Raises:
        ValueError: there is not one label for each position, or not one weight for each row.
    """
    check_labels(labels, logits)
    items_per_row = label_counts(labels, loss_weights)
    if num_items_in_batch is None:
        num_items_in_batch = items_per_row.sum()
    num_items = torch.as_tensor(num_items_in_batch, device=logits.device)
    if loss_weights is None:
        num_items = num_items.clamp(min=1)
        kwargs |= {"vocab_size": logits.shape[-1], "num_items_in_batch": num_items}
        loss = loss_function(logits=logits, labels=labels, **kwargs)
        return LabelLoss(loss, items_per_row.to(num_items.device) / num_items)
    num_items = num_items.float().clamp(min=torch.finfo(torch.float32).tiny)
    shifted = labels[:, 1:].to(logits.device)
    per_token = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        shifted.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    row_losses = per_token.view_as(shifted).sum(-1)
    loss = (row_losses * loss_weights.to(row_losses)).sum() / num_items
    return LabelLoss(loss, items_per_row.to(num_items.device) / num_items, row_losses.detach())


def require_labels(labels: torch.Tensor | None, loss_weights: torch.Tensor | None) -> None:
    """Raise `ValueError` if there are weights of a loss that is not computed here."""
    if labels is None and loss_weights is not None:
        raise ValueError(
            "There are `loss_weights`, but no `labels` that they could weigh: a loss that is "
            "computed elsewhere, as with label smoothing, would ignore them."
        )


def label_counts(labels: torch.Tensor, loss_weights: torch.Tensor | None = None) -> torch.Tensor:
    """Count the label tokens of each row, (batch,), that are predicted, times its weight."""
    counts = (labels[..., 1:] != IGNORED).sum(-1)
    if loss_weights is None:
        return counts
    if loss_weights.shape != counts.shape:
        raise ValueError(
            f"`loss_weights` is {tuple(loss_weights.shape)}; it needs one number for each row of "
            f"`labels`, {tuple(counts.shape)}."
        )
    return counts * loss_weights.to(counts.device)
