# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The feed-forward half of a decoder layer: a dense gated MLP, or a router and its experts.

`VLMoEExperts` is one fused bank with the parameters
- `gate_up_proj` (experts, 2 * intermediate, hidden), gate first, then up
- `down_proj` (experts, hidden, intermediate)
computed by the library's experts interface: eager, batched_mm, grouped_mm, ... as
`config._experts_implementation` says.
"""

import torch
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeMLP

from ..configuration.configuration_vlmoe import VLMoETextConfig
from .router import VLMoERouter


class VLMoEMLP(Qwen3MoeMLP):
    """Dense gated MLP: (..., hidden) -> (..., hidden)."""


class VLMoEExperts(Qwen3MoeExperts):
    """Fused bank of gated MLPs; inherits `@use_experts_implementation` and all its implementations.

    (tokens, hidden), indices (tokens, k), weights (tokens, k) -> (tokens, hidden)
    """


class VLMoESparseMoeBlock(nn.Module):
    """Routed experts plus, if configured, shared experts that every token passes through."""

    def __init__(self, config: VLMoETextConfig):
        super().__init__()
        self.router = VLMoERouter(config)
        self.experts = VLMoEExperts(config)
        self.shared_experts = None
        if config.num_shared_experts:
            self.shared_experts = VLMoEMLP(
                config, config.moe_intermediate_size * config.num_shared_experts
            )

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, length, hidden) -> the same, and router logits (batch * length, experts)."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (tokens, hidden)
        router_logits, top_k_weights, top_k_index = self.router(tokens)
        output = self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        return output, router_logits
