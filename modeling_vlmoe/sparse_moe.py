# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The feed-forward half of a decoder layer: a dense gated MLP, or a router and its experts.

`VLMoEExperts` is one fused bank with the parameters
- `gate_up_proj` (experts, 2 * intermediate, hidden), gate first, then up
- `down_proj` (experts, hidden, intermediate)
computed by the library's experts interface: eager, batched_mm, grouped_mm, ... as
`config._experts_implementation` says. This module adds "auto" to them (experts_auto.py).

In training a sparse layer also keeps statistics on its device, which are read once per optimizer
step: whether its router logits were finite (vlmoe/routing/finite_checks.py) and, where a bias
balances the experts (vlmoe/routing/balancing.py), how many tokens each one got. They are plain
tensors: buffers would be saved, and DistributedDataParallel would overwrite them with rank 0's.
"""

from typing import cast

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


class VLMoERoutingStats(nn.Module):
    """Statistics of the routing in training; the base of sparse blocks."""

    def __init__(self, text_config: VLMoETextConfig):
        super().__init__()
        self.text_config = text_config
        self.has_selection_bias = text_config.router_bias_update_rate != 0
        self.expert_load: torch.Tensor | None = None  # (experts,) int64
        self.non_finite: torch.Tensor | None = None  # () bool

    @property
    def router_bias_update_rate(self) -> float:
        """The config's current rate, for a router that was made with a bias."""
        return self.text_config.router_bias_update_rate if self.has_selection_bias else 0.0

    @torch.no_grad()
    def update_stats(
        self, router_logits: torch.Tensor, top_k_index: torch.Tensor, token_counts: torch.Tensor
    ) -> None:
        """Add one forward pass of training to `non_finite` and, with a bias, to `expert_load`.

        Call it outside of checkpointed layers, which run twice. Padding counts in `non_finite`,
        since 0 * NaN would reach the gradients, and not in `expert_load`.

        Args:
            router_logits, top_k_index: (tokens, experts), (tokens, k): as `forward` returned them.
            token_counts: (tokens,): 0 or False for padding, otherwise how often the token counts.
        """
        non_finite = router_logits.isfinite().all().logical_not()
        if self.non_finite is None or self.non_finite.device != non_finite.device:
            self.non_finite = torch.zeros_like(non_finite)
        self.non_finite.logical_or_(non_finite)
        if self.router_bias_update_rate:
            chosen = torch.zeros_like(router_logits, dtype=torch.long)  # (tokens, experts)
            chosen = chosen.scatter(-1, top_k_index, 1)
            load = (chosen * token_counts.to(chosen.device)[:, None]).sum(0)  # (experts,)
            if self.expert_load is None or self.expert_load.device != load.device:
                self.expert_load = torch.zeros_like(load)
            self.expert_load.add_(load)


class VLMoESparseMoeBlock(VLMoERoutingStats):
    """Routed experts plus, if configured, shared experts for every token."""

    def __init__(self, config: VLMoETextConfig):
        super().__init__(config)
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
    ) -> tuple[torch.Tensor, ...]:
        """(batch, length, hidden) -> the same, router logits (batch * length, experts), choice.

        The choice is (batch * length, k). `mm_token_type_ids` (batch, length) is for the router.
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
        return output, router_logits, top_k_index


def sparse_layers(model: nn.Module) -> dict[str, VLMoESparseMoeBlock]:
    """Return the sparse block of each layer that has one, by name, in order.

    They are found by the class's name, which code from the Hub and FSDP2's subclasses keep.
    """
    return {
        name: cast(VLMoESparseMoeBlock, module)
        for name, module in model.named_modules()
        if "VLMoE" in type(module).__name__ and type(module).__name__.endswith("SparseMoeBlock")
    }
