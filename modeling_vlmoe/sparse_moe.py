# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The feed-forward half of a decoder layer: a dense gated MLP, or a router and its experts.

`VLMoEExperts` is one fused bank with the parameters
- `gate_up_proj` (experts, 2 * intermediate, hidden), gate first, then up
- `down_proj` (experts, hidden, intermediate)
computed by the library's experts interface: eager, batched_mm, grouped_mm, ... as
`config._experts_implementation` says. This module adds "auto" to them (experts_auto.py).
"""

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeMLP

from ..configuration.configuration_vlmoe_text import VLMoETextConfig
from .experts_auto import auto_experts_forward
from .router import VLMoERouter

ExpertsInterface.register("auto", auto_experts_forward)


class VLMoEMLP(Qwen3MoeMLP):
    """Dense gated MLP: (..., hidden) -> (..., hidden)."""


class VLMoEExperts(Qwen3MoeExperts):
    """Fused bank of gated MLPs; inherits `@use_experts_implementation` and all its implementations.

    (tokens, hidden), indices (tokens, k), weights (tokens, k) -> (tokens, hidden)
    """


class VLMoESparseMoeBlock(nn.Module):
    """Routed experts plus, if configured, shared experts for every token."""

    def __init__(self, config: VLMoETextConfig):
        super().__init__()
        self.router = VLMoERouter.from_config(config)
        self.experts = VLMoEExperts(config)
        self.shared_experts = self.shared_expert_gate = None
        if config.num_shared_experts:
            width = config.moe_intermediate_size * config.num_shared_experts
            self.shared_experts = VLMoEMLP(config, width)
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, mm_token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, length, hidden) -> the same, router logits (batch * length, experts).

        `mm_token_type_ids` (batch, length) is for the router.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (tokens, hidden)
        types = None if mm_token_type_ids is None else mm_token_type_ids.flatten()
        router_logits, top_k_weights, top_k_index = self.router(tokens, types)
        output = self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)
        if self.shared_experts is not None:
            shared = self.shared_experts(hidden_states)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(hidden_states).sigmoid() * shared
            output = output + shared
        return output, router_logits
