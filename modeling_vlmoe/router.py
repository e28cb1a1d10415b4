# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The router: which k experts each token is sent to, and with what weights.

Its parameters have the model's dtype, its arithmetic is fp32 in bf16 models and under autocast too:
a rounding error here does not change a value a little, it sends the token to another expert. It
draws no random numbers, so that gradient checkpointing recomputes the same routing.

With `router_bias_update_rate` it has a bias for each expert, which is added to the scores where the
experts are chosen, and nowhere else (https://arxiv.org/abs/2408.15664; DeepSeek-V3,
https://arxiv.org/abs/2412.19437, section 2.1.2). No gradient moves it: training/router_bias.py
does, once per optimizer step. It is a buffer, and DistributedDataParallel writes rank 0's buffers
over those of the others: harmless, as all ranks compute the same bias.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from ..configuration.configuration_vlmoe import VLMoETextConfig


class VLMoERouter(nn.Module):
    """Top-k router with softmax or sigmoid scores."""

    e_score_correction_bias: torch.Tensor | None  # (experts,) fp32; the name DeepSeek-V3 gave it

    def __init__(self, config: VLMoETextConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.scoring_func = config.scoring_func
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = None
        if config.router_bias_update_rate != 0:
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Moves the bias with the router, but keeps it in fp32: `.to(torch.bfloat16)` would round
        away updates of less than 1/256 of it."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        applied = self.e_score_correction_bias
        if bias is not None and applied is not None and applied.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(applied.device)
        return self

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens, hidden) -> logits (tokens, experts), weights and indices (tokens, k)."""
        with maybe_autocast(hidden_states.device.type, enabled=False):
            router_logits = F.linear(
                hidden_states.float(), self.weight.float()
            )  # (tokens, experts)
            scores = (
                router_logits.softmax(-1)
                if self.scoring_func == "softmax"
                else router_logits.sigmoid()
            )
            if self.e_score_correction_bias is None:
                top_k_weights, top_k_index = scores.topk(self.top_k, dim=-1)  # (tokens, k) each
            else:
                choice = scores + self.e_score_correction_bias
                top_k_index = choice.topk(self.top_k, dim=-1).indices  # (tokens, k)
                top_k_weights = scores.gather(-1, top_k_index)  # (tokens, k)
            if self.norm_topk_prob:
                total = top_k_weights.sum(-1, keepdim=True)  # 0 where all sigmoids underflow
                top_k_weights = top_k_weights / total.clamp(min=torch.finfo(total.dtype).tiny)
            return router_logits, top_k_weights * self.routed_scaling_factor, top_k_index
