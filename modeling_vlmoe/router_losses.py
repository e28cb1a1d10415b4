# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Losses on router logits, as pure functions, and their sum as a config weighs them.

Shapes: layers, batch, length, experts. Every function takes
- `router_logits`: one (batch * length, experts) tensor per sparse layer
- `token_mask` (batch, length): True for real tokens; padding counts nowhere
- `row_weights` (batch,): the share of each row in the loss; they sum to 1 over the whole batch of
  an optimizer step

and returns a scalar (entropies in nats), the mean over layers: layers are never pooled, since two
layers collapsed onto different experts would then look balanced.

Tokens that are balanced together (`router_aux_loss_scope`):
- `"sequence"`: statistics row by row, as in DeepSeek-V3's sequence-wise loss
  (https://arxiv.org/abs/2412.19437, eq. 17-20). A row's loss does not depend on the rows beside
  it, and with each row weighted by its share of label tokens (as cross-entropy weights it) one
  optimizer step gets the same gradient however its rows are split over micro-batches and ranks.
- `"batch"`: the rows of a micro-batch are one long row with the sum of their weights, as in
  transformers, but per layer. Tokens of one row may all go to the same experts if those of other
  rows go elsewhere; the update depends on the micro-batches.
- `"global"`: the same over the micro-batches of all ranks (https://arxiv.org/abs/2501.11873), with
  one all-reduce of counts per forward pass of training. Each rank's loss is the part of its own
  tokens: their sum is the loss of one process with all rows. All ranks must take part.

Terms that compare no tokens with each other, the z-loss and the local entropy, are those of single
tokens in every scope.

A selection bias (`router_bias_update_rate`) is not among the arguments: fractions are those of the
k best scores, as in eq. 18. The loss moves the scores; with the bias in the choice it would not see
an imbalance that the bias compensates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..configuration.configuration_vlmoe_text import MODALITIES, Modality, VLMoETextConfig
from .router import Routing, choose_experts

Summed = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class RouterLosses:
    """The router losses, each None where it is off, and their sum.

    Attributes:
        total: the sum of all, with their coefficients, a scalar; None before there are any.
        aux_loss: load balancing loss, before its coefficient.
        z_loss: router z-loss, before its coefficient.
        entropy_loss: LIMoE's terms, with their coefficients.
    """

    total: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None

    def added_to(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a loss plus the total, if there are router losses."""
        return loss if self.total is None else loss + self.total.to(loss.device)


def sum_of_losses(places: Sequence[RouterLosses]) -> RouterLosses:
    """Add up the losses of several places: decoder, tower, connector; a loss that is off is 0."""
    if len(places) < 2:
        return places[0] if places else RouterLosses()
    sums = RouterLosses()
    for name in vars(sums):
        values = [getattr(each, name) for each in places if getattr(each, name) is not None]
        if values:
            setattr(sums, name, torch.stack([each.to(values[0].device) for each in values]).sum())
    return sums


def _stack(router_logits: tuple[torch.Tensor, ...], token_mask: torch.Tensor) -> torch.Tensor:
    device = router_logits[0].device
    layers = torch.stack([logits.to(device).float() for logits in router_logits])
    return layers.unflatten(1, tuple(token_mask.shape))  # (layers, batch, length, experts)


def _probabilities(logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """Divide scores by their sum."""
    if scoring_func == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    total = scores.sum(-1, keepdim=True)
    return scores / total.clamp(min=torch.finfo(total.dtype).tiny)


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    top_k: int,
    token_mask: torch.Tensor,
    row_weights: torch.Tensor,
    scoring_func: str = "softmax",
    *,
    n_group: int = 1,
    topk_group: int = 1,
    banks: Sequence[tuple[torch.Tensor, int]] = (),
    summed: Summed | None = None,
) -> torch.Tensor:
    """Compute the load balancing loss per row and layer.

    From Switch Transformer (https://arxiv.org/abs/2101.03961, eq. 4-6):

    experts * sum_e(f_e * P_e), where f_e is the number of tokens sent to expert e and P_e the mean
    routing probability, both per token. Perfect balance gives `top_k`, as in transformers; collapse
    onto k experts gives `experts`.

    Args:
        router_logits, token_mask, row_weights: see the module's docstring.
        top_k, scoring_func, n_group, topk_group: as the router chooses.
        banks: for each set of tokens that may use the same experts a mask (batch, length) and the
            number of those experts. Each is balanced alone, with the share of its tokens. By
            default all tokens may use all experts.
        summed: sums a tensor over ranks; for scope `"global"`, where there is one row.
    """
    logits = _stack(router_logits, token_mask)
    probabilities = _probabilities(logits, scoring_func)
    chosen = torch.zeros_like(logits).scatter_(
        -1, choose_experts(probabilities.detach(), top_k, n_group, topk_group), 1.0
    )
    banks = banks or [(token_mask, logits.shape[-1])]
    masks = [(members & token_mask).to(logits)[..., None] for members, _ in banks]
    load = torch.stack([(chosen * mask).sum(2) for mask in masks])
    importance = torch.stack([(probabilities * mask).sum(2) for mask in masks])
    # load, importance (banks, layers, batch, experts)
    tokens = torch.stack([mask.sum(1) for mask in masks])[:, None]  # (banks, 1, batch, 1)
    if summed is not None:
        load, tokens, row_weights = all_reduce_together(summed, load, tokens, row_weights)
    fractions = load / tokens.clamp(min=1)
    share = importance / tokens.sum(0).clamp(min=1)
    num_experts = logits.new_tensor([number for _, number in banks])[:, None, None]
    per_row = (num_experts * (fractions * share).sum(-1)).sum(0)  # (layers, batch)
    return (per_row * row_weights.to(per_row)).sum(-1).mean()


def router_z_loss(
    router_logits: tuple[torch.Tensor, ...], token_mask: torch.Tensor, row_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the router z-loss, the mean squared logsumexp of the logits.

    From ST-MoE (https://arxiv.org/abs/2202.08906, eq. 5).
    """
    squared = _stack(router_logits, token_mask).logsumexp(-1).square()  # (layers, batch, length)
    return _mean_of_rows(squared, token_mask, row_weights)


def local_entropy_loss(
    router_logits: tuple[torch.Tensor, ...],
    token_mask: torch.Tensor,
    row_weights: torch.Tensor,
    scoring_func: str = "softmax",
) -> torch.Tensor:
    """Compute the mean entropy of the tokens' routing distributions: 0 where the router is sure.

    LIMoE's local loss (https://arxiv.org/abs/2206.02770). With a mask of one modality's
    tokens it is that modality's, and rows without such tokens add nothing.
    """
    probabilities = _probabilities(_stack(router_logits, token_mask), scoring_func)
    return _mean_of_rows(_entropy(probabilities), token_mask, row_weights)


def global_entropy_loss(
    router_logits: tuple[torch.Tensor, ...],
    token_mask: torch.Tensor,
    row_weights: torch.Tensor,
    scoring_func: str = "softmax",
    *,
    spread_over: int,
    summed: Summed | None = None,
) -> torch.Tensor:
    """Compute how far the entropy of a row's mean distribution is below log(`spread_over`).

    LIMoE's global loss with its threshold (https://arxiv.org/abs/2206.02770), which keeps the
    tokens of one modality from collapsing onto few experts; 0 from the threshold on.

    Args:
        router_logits, token_mask, row_weights: as in `local_entropy_loss`.
        scoring_func: as the router scores.
        spread_over: number of experts that the tokens should be spread over at least.
        summed: sums a tensor over ranks; for scope `"global"`, where there is one row.
    """
    probabilities = _probabilities(_stack(router_logits, token_mask), scoring_func)
    mask = token_mask.to(probabilities)[..., None]  # (batch, length, 1)
    # (layers, batch, experts), (batch, 1)
    own, own_tokens = (probabilities * mask).sum(2), mask.sum(1)
    total, tokens = own.detach(), own_tokens
    if summed is not None:
        total, tokens, row_weights = all_reduce_together(summed, total, tokens, row_weights)
    tokens = tokens.clamp(min=1)
    mean = total / tokens
    threshold = math.log(spread_over)
    below = (_entropy(mean) < threshold).to(mean)  # (layers, batch)
    # The constant log has the gradient of p log p, as each token's probabilities sum to 1; and each
    # rank's part of the sum is that of its own tokens.
    negative_entropy = (own / tokens * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum(-1)
    per_row = below * (threshold * (own_tokens / tokens)[:, 0] + negative_entropy)
    return (per_row * row_weights.to(per_row)).sum(-1).mean()


@dataclass
class TokenGroups:
    """The groups of tokens that losses compare: one for each row, or all in one row.

    mask, is_image: (rows, length); row_weights: (rows,); summed: over ranks, if they are one row.
    """

    mask: torch.Tensor
    is_image: torch.Tensor
    row_weights: torch.Tensor
    summed: Summed | None = None

    def of(self, modality: str) -> torch.Tensor:
        """(rows, length): True for real tokens of the modality."""
        return self.mask & (self.is_image if modality == "image" else ~self.is_image)

    def in_scope(self, scope: str, training: bool) -> "TokenGroups":
        """Return the groups that a `router_aux_loss_scope` compares."""
        if scope == "sequence":
            return self
        summed = None
        if scope == "global" and training and torch.distributed.is_available():
            summed = _sum_over_ranks if torch.distributed.is_initialized() else None
        one_row = self.mask.reshape(1, -1), self.is_image.reshape(1, -1)
        return TokenGroups(*one_row, self.row_weights.sum()[None], summed)


def decoder_router_losses(
    config: VLMoETextConfig,
    router_logits: tuple[torch.Tensor, ...],
    token_mask: torch.Tensor,
    row_weights: torch.Tensor,
    mm_token_type_ids: torch.Tensor | None = None,
    training: bool = False,
) -> RouterLosses:
    """Compute the router losses of the decoder that the config asks for.

    Args:
        config: the coefficients, the scope, and how the router chooses.
        router_logits, token_mask, row_weights: see the module's docstring.
        mm_token_type_ids: (batch, length), 1 for image tokens; needed where the config speaks of
            modalities (`needs_token_types`).
        training: whether ranks may wait for each other; scope `"global"` is `"batch"` otherwise.
    """
    device = router_logits[0].device
    token_mask, row_weights = token_mask.to(device), row_weights.to(device)
    is_image = torch.zeros_like(token_mask)
    if mm_token_type_ids is not None:
        is_image = mm_token_type_ids.to(device) == Modality.image.value
    rows = TokenGroups(token_mask, is_image, row_weights)
    return losses_of_place(config, router_logits, rows, training, config)


def losses_of_place(
    config: VLMoETextConfig,
    router_logits: tuple[torch.Tensor, ...],
    rows: TokenGroups,
    training: bool,
    routing: Routing | VLMoETextConfig,
) -> RouterLosses:
    """Compute the router losses of the decoder, the tower or the connector.

    `routing` says how their routers choose. The decoder's is `config` itself: only there are banks
    and entropy losses, which compare modalities.
    """
    compared = rows.in_scope(config.router_aux_loss_scope, training)
    losses, banks = RouterLosses(), []
    if config.router_z_loss_coef != 0:
        losses.z_loss = router_z_loss(router_logits, rows.mask, rows.row_weights)
    if routing is config and config.has_separate_banks:
        banks = [(compared.of(name), len(config.experts_of(name))) for name in MODALITIES]
    if config.router_aux_loss_coef != 0:
        losses.aux_loss = load_balancing_loss(
            router_logits,
            routing.num_experts_per_tok,
            compared.mask,
            compared.row_weights,
            routing.scoring_func,
            n_group=routing.n_group,
            topk_group=routing.topk_group,
            banks=banks,
            summed=compared.summed,
        )
    if routing is config and config.has_entropy_losses:
        losses.entropy_loss = _entropy_loss(config, router_logits, rows, compared)
    losses.total = torch.zeros((), device=rows.mask.device)
    for coefficient, loss in (
        (config.router_z_loss_coef, losses.z_loss),
        (config.router_aux_loss_coef, losses.aux_loss),
        (1, losses.entropy_loss),
    ):
        if loss is not None:
            losses.total = losses.total + coefficient * loss
    return losses


def _entropy_loss(
    config: VLMoETextConfig,
    router_logits: tuple[torch.Tensor, ...],
    rows: TokenGroups,
    compared: TokenGroups,
) -> torch.Tensor:
    total = torch.zeros((), device=rows.mask.device)
    scoring_func = config.scoring_func
    for modality, coefficient in (config.router_local_entropy_coef or {}).items():
        mask, weights = rows.of(modality), rows.row_weights
        total = total + coefficient * local_entropy_loss(router_logits, mask, weights, scoring_func)
    for modality, coefficient in (config.router_global_entropy_coef or {}).items():
        total = total + coefficient * global_entropy_loss(
            router_logits,
            compared.of(modality),
            compared.row_weights,
            scoring_func,
            spread_over=config.spread_over(modality),
            summed=compared.summed,
        )
    return total


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """(..., experts) -> (...), in nats."""
    tiny = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp(min=tiny).log()).sum(-1)


def _mean_of_rows(
    values: torch.Tensor, token_mask: torch.Tensor, row_weights: torch.Tensor
) -> torch.Tensor:
    """(layers, batch, length) -> the weighted sum of the rows' means, averaged over layers."""
    mask = token_mask.to(values)
    per_row = (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)  # (layers, batch)
    return (per_row * row_weights.to(per_row)).sum(-1).mean()


def _sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(values)
    return values


def all_reduce_together(summed: Summed, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Sum several tensors over ranks by one call, without gradient."""
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    parts = summed(flat).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
