# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Losses on router logits, as pure functions.

Shapes: layers, batch, length, experts. Every function takes
- `router_logits`: one (batch * length, experts) tensor per sparse layer
- `token_mask` (batch, length): True for real tokens; padding counts nowhere
- `row_weights` (batch,): the share of each row in the loss; they sum to 1 over the whole batch of
  an optimizer step

and computes its statistics row by row, as DeepSeek-V3's sequence-wise loss does
(https://arxiv.org/abs/2412.19437, eq. 17-20). A row's loss therefore does not depend on the rows
beside it, and with each row weighted by its share of label tokens (as cross-entropy weights it) one
optimizer step gets the same gradient however its rows are split over micro-batches and ranks. The
result is the mean over layers: layers are never pooled, since two layers collapsed onto different
experts would then look balanced.

A selection bias (`router_bias_update_rate`) is not among the arguments: fractions are those of the
k best scores, as in eq. 18. It is the scores that the loss moves; with the bias in the choice, an
imbalance that the bias makes up for would be hidden from it.
"""

import torch


def _stack(router_logits: tuple[torch.Tensor, ...], token_mask: torch.Tensor) -> torch.Tensor:
    device = router_logits[0].device
    layers = torch.stack([logits.to(device).float() for logits in router_logits])
    return layers.unflatten(1, tuple(token_mask.shape))  # (layers, batch, length, experts)


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    top_k: int,
    token_mask: torch.Tensor,
    row_weights: torch.Tensor,
    scoring_func: str = "softmax",
) -> torch.Tensor:
    """Load balancing loss per row and layer.

    From Switch Transformer (https://arxiv.org/abs/2101.03961, eq. 4-6):

    experts * sum_e(f_e * P_e), where f_e is the number of tokens sent to expert e and P_e the mean
    routing probability, both per token. Perfect balance gives `top_k`, as in transformers; collapse
    onto k experts gives `experts`.

    Returns: a scalar.
    """
    logits = _stack(router_logits, token_mask)
    scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
    total = scores.sum(-1, keepdim=True)
    probabilities = scores / total.clamp(min=torch.finfo(total.dtype).tiny)
    chosen = torch.zeros_like(logits).scatter_(-1, logits.topk(top_k, dim=-1).indices, 1.0)
    mask = token_mask.to(logits.device, logits.dtype)[..., None]  # (batch, length, 1)
    tokens = mask.sum(1).clamp(min=1)  # (batch, 1)
    load = (chosen * mask).sum(2) / tokens  # (layers, batch, experts)
    importance = (probabilities * mask).sum(2) / tokens  # (layers, batch, experts)
    per_row = logits.shape[-1] * (load * importance).sum(-1)  # (layers, batch)
    return (per_row * row_weights.to(per_row)).sum(-1).mean()


def router_z_loss(
    router_logits: tuple[torch.Tensor, ...], token_mask: torch.Tensor, row_weights: torch.Tensor
) -> torch.Tensor:
    """Router z-loss: mean squared logsumexp of the logits.

    From ST-MoE (https://arxiv.org/abs/2202.08906, eq. 5).

    Returns: a scalar.
    """
    squared = _stack(router_logits, token_mask).logsumexp(-1).square()  # (layers, batch, length)
    mask = token_mask.to(squared)
    per_row = (squared * mask).sum(-1) / mask.sum(-1).clamp(min=1)  # (layers, batch)
    return (per_row * row_weights.to(per_row)).sum(-1).mean()
