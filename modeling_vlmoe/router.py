# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The router: which k experts each token is sent to, and with what weights.

Its parameters have the model's dtype, its arithmetic is fp32 in bf16 models and under autocast too:
a rounding error here does not change a value a little, it sends the token to another expert. It
draws no random numbers, so that gradient checkpointing recomputes the same routing.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from ..configuration.configuration_vlmoe import VLMoETextConfig


class VLMoERouter(nn.Module):
    """Top-k router with softmax or sigmoid scores."""

    def __init__(self, config: VLMoETextConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.scoring_func = config.scoring_func
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

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
            top_k_weights, top_k_index = scores.topk(self.top_k, dim=-1)  # (tokens, k) each
            if self.norm_topk_prob:
                total = top_k_weights.sum(-1, keepdim=True)  # 0 where all sigmoids underflow
                top_k_weights = top_k_weights / total.clamp(min=torch.finfo(total.dtype).tiny)
            return router_logits, top_k_weights * self.routed_scaling_factor, top_k_index
