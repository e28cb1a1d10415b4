# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The router chooses k experts for each token, and their weights.

Its parameters have the model's dtype, its arithmetic is fp32 in bf16 models and under autocast too:
a rounding error here does not change a value a little, it sends the token to another expert.

There is no router noise (Shazeer et al., https://arxiv.org/abs/1701.06538, section 4). Balancing
losses and the selection bias spread tokens, too, and recomputation under gradient checkpointing
would draw other random numbers: the backward pass would be that of another routing.

- Selection bias (`router_bias_update_rate`): a number for each expert, added to the scores where
  the experts are chosen, and nowhere else (https://arxiv.org/abs/2408.15664; DeepSeek-V3,
  https://arxiv.org/abs/2412.19437, section 2.1.2). It has no gradient: vlmoe/routing/balancing.py
  updates it once per optimizer step. It is a buffer, and DistributedDataParallel writes rank 0's
  over those of the others: harmless, as all ranks compute the same bias.
- Groups (`n_group`, `topk_group`): only the best groups of neighboring experts are chosen from.
- Modality (`modality_experts`, `router_modality_bias`): a mask over one bank of experts, never a
  branch, so that every batch does the same work.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..configuration.configuration_vlmoe_text import Modality, VLMoETextConfig

logger = logging.get_logger(__name__)

TEXT, IMAGE = Modality.text.value, Modality.image.value
CONSTANT_WEIGHT = (
    "A router sends each token to one expert (k = 1) and normalizes its weight, which is then "
    "always 1: no gradient of the task reaches the router, only that of balancing losses. Set "
    "`norm_topk_prob=False` in the config (in tower and connector `vision_norm_topk_prob`, "
    "`projector_norm_topk_prob`), which changes the model's function, or train with k = 2 or more."
)


def choose_experts(
    scores: torch.Tensor, top_k: int, n_group: int = 1, topk_group: int = 1
) -> torch.Tensor:
    """(..., experts) -> the indices of the k best, (..., k).

    With more than one group, among the experts of the best `topk_group` groups only. A group is as
    good as the sum of its two best scores, as in transformers' DeepSeek-V3
    (https://arxiv.org/abs/2412.19437, section 2.1.2).
    """
    if n_group > 1:
        groups = scores.unflatten(-1, (n_group, -1))  # (..., groups, experts of a group)
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)  # (..., groups)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(
            -1, best.topk(topk_group, dim=-1).indices, True
        )
        scores = groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    return scores.topk(top_k, dim=-1).indices


@dataclass
class Routing:
    """The fields of `VLMoETextConfig` that a router reads; such a config may take its place."""

    num_experts_per_tok: int
    scoring_func: str = "softmax"
    norm_topk_prob: bool | None = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    modality_experts: Mapping[str, Sequence[int]] | None = None


class VLMoERouter(nn.Module):
    """Top-k router with softmax or sigmoid scores.

    Args:
        hidden_size, num_experts: its shape.
        routing: read at every call, so that a change in a config counts from the next one.
        has_selection_bias, has_modality_bias: whether it has such biases; both start at zero.
    """

    e_score_correction_bias: torch.Tensor | None  # (experts,) fp32; the name DeepSeek-V3 gave it
    allowed_experts: torch.Tensor | None  # (modalities, experts)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        routing: Routing | VLMoETextConfig,
        *,
        has_selection_bias: bool = False,
        has_modality_bias: bool = False,
    ):
        super().__init__()
        self.routing = routing
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.modality_bias = None
        if has_modality_bias:
            self.modality_bias = nn.Parameter(torch.zeros(len(Modality), num_experts))
        bias = torch.zeros(num_experts, dtype=torch.float32) if has_selection_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.masked_by: Mapping[str, Sequence[int]] | None = None
        self.register_buffer("allowed_experts", None, persistent=False)
        self._follow_modality_experts()

    @classmethod
    def from_config(cls, config: VLMoETextConfig) -> Self:
        """Make the router of a decoder layer."""
        return cls(
            config.hidden_size,
            config.num_experts,
            config,
            has_selection_bias=config.router_bias_update_rate != 0,
            has_modality_bias=config.router_modality_bias,
        )

    @property
    def top_k(self) -> int:
        """Experts that each token is sent to."""
        return self.routing.num_experts_per_tok

    @property
    def scoring_func(self) -> str:
        """`"softmax"` or `"sigmoid"`."""
        return self.routing.scoring_func

    def modality_mask(self) -> torch.Tensor:
        """(modalities, experts): True where tokens of the modality may use the expert."""
        mask = torch.zeros(len(Modality), self.weight.shape[0], dtype=torch.bool)
        for modality, experts in (self.masked_by or {}).items():
            mask[Modality[modality], list(experts)] = True
        return mask

    def _follow_modality_experts(self) -> None:
        """Update the mask if the lists of experts have changed."""
        if self.routing.modality_experts == self.masked_by:
            return
        self.masked_by = copy.deepcopy(self.routing.modality_experts)
        self.allowed_experts = None
        if self.masked_by is not None:
            self.allowed_experts = self.modality_mask().to(self.weight.device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move the bias with the router, but keep it in fp32.

        `.to(torch.bfloat16)` would round away updates of less than 1/256 of it.
        """
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        applied = self.e_score_correction_bias
        if bias is not None and applied is not None and applied.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(applied.device)
        return self

    def forward(
        self, hidden_states: torch.Tensor, mm_token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens, hidden) -> logits (tokens, experts), weights and indices (tokens, k).

        `mm_token_type_ids` (tokens,): 1 for image tokens; by default all are text. Logits of
        experts that a token may not use are the lowest finite number: their scores are 0.
        """
        routing = self.routing
        self._follow_modality_experts()
        with maybe_autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())  # (tokens, experts)
            allowed = None
            if self.modality_bias is not None:
                logits = logits + _by_modality(self.modality_bias.float(), mm_token_type_ids)
            if self.allowed_experts is not None:
                allowed = _by_modality(self.allowed_experts, mm_token_type_ids)
                logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
            scores = logits.softmax(-1) if routing.scoring_func == "softmax" else logits.sigmoid()
            choice = scores
            if self.e_score_correction_bias is not None:
                choice = choice + self.e_score_correction_bias
            if allowed is not None:  # an allowed score can be 0, too, or less with the bias
                choice = choice.masked_fill(~allowed, float("-inf"))
            k, groups = routing.num_experts_per_tok, (routing.n_group, routing.topk_group)
            top_k_index = choose_experts(choice, k, *groups)
            top_k_weights = scores.gather(-1, top_k_index)  # (tokens, k)
            if routing.norm_topk_prob:
                if k == 1 and not is_torchdynamo_compiling():
                    self._warn_of_constant_weight()
                total = top_k_weights.sum(-1, keepdim=True)  # 0 where all sigmoids underflow
                top_k_weights = top_k_weights / total.clamp(min=torch.finfo(total.dtype).tiny)
            return logits, top_k_weights * routing.routed_scaling_factor, top_k_index

    def _warn_of_constant_weight(self) -> None:
        """Warn once, in training, that the task cannot train this router."""
        learns = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        if learns and self.weight.shape[0] > 1:
            logger.warning_once(CONSTANT_WEIGHT)


def _by_modality(rows: torch.Tensor, mm_token_type_ids: torch.Tensor | None) -> torch.Tensor:
    """(modalities, experts) -> the row of each token, (tokens, experts), or that of text.

    Not by indexing, whose gradient is summed in no fixed order on a GPU.
    """
    text, image = rows[TEXT], rows[IMAGE]
    if mm_token_type_ids is None:
        return text
    return torch.where((mm_token_type_ids == IMAGE)[:, None], image, text)
