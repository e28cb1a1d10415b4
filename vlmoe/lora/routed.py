# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""LoRA on fused experts without adapted weights: x W_e^T + s (x A_e^T) B_e^T for the rows of e.

PEFT adapts a 3-D parameter by computing W_e + s B_e A_e for all experts in every forward pass, and
its backward pass forms a gradient of that shape. Here neither exists: the base weights are frozen,
and the two thin products are computed for the routed tokens. Two ways give the same numbers:
- routed_cpu.py, expert by expert, on CPUs, for silu-gated experts;
- `_grouped`, grouped matrix products of the whole bank, for every device and layout.
Both take int8 weights, one expert at a time: int8.py.

Rows are the (token, choice) pairs sorted by expert. Shapes: T tokens, k experts per token,
S rows = T * k, E experts, H hidden, I intermediate, r rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate, _grouped_linear

from .int8 import int8_grouped_linear, stored
from .routed_cpu import routed_lora_cpu

Tensor = torch.Tensor


class ExpertAdapter(NamedTuple):
    """One adapter of one projection as PEFT stores it; B_e A_e * scaling is added to W_e.

    A scaling by expert, (E, 1, 1), that is zero for some keeps their B, if it is zero, and A from
    getting gradients.
    """

    lora_a: Tensor  # (r * E, in): r rows of one expert, then those of the next
    lora_b: Tensor  # (out, r * E): column r' * E + e belongs to expert e
    scaling: float | Tensor


def routed_lora_forward(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: Mapping[str, Sequence[ExpertAdapter | None]],
    dropout: float = 0.0,
    adapter_of_token: Tensor | None = None,
) -> Tensor:
    """(T, H), choice (T, k), routing weights (T, k) -> (T, H), as `experts` with its adapters.

    Computes in the dtype of the base weights, as the grouped experts implementation does, or under
    autocast in autocast's dtype, as `F.linear` does.

    Args:
        experts: a bank under transformers' `@use_experts_implementation`, weights frozen, plain or
            int8 of torchao.
        hidden_states, top_k_index, top_k_weights: as its `forward` takes them.
        adapters: by parameter name, the active ones, which add up.
        dropout: probability that an element of an adapter's input is dropped, row by row.
        adapter_of_token: (T,) the one adapter of each token, as an index into the lists of
            `adapters`, which may hold None; the index after the last one is the bank alone.
    """
    k, device = top_k_index.shape[-1], hidden_states.device
    dtype = experts.down_proj.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    x = hidden_states.to(dtype)
    by_kernel = not dropout and adapter_of_token is None and _fits_cpu_kernel(experts, device)
    # Groups of rows: by expert, or by expert and adapter.
    per_expert, group = 1, top_k_index.reshape(-1)
    if adapter_of_token is not None:
        per_expert = 1 + max(len(each) for each in adapters.values())
        group = group * per_expert + adapter_of_token.repeat_interleave(k)
    group, order = torch.sort(group)
    group_ends = _ends(group, experts.num_experts * per_expert)
    ends = group_ends[per_expert - 1 :: per_expert].contiguous()  # (E,)
    row_weights = top_k_weights.reshape(-1)[order]
    # The few numbers of rank r are not rounded to half precision, where products in fp32 are no
    # slower than others: CUDA's grouped kernels are for bf16.
    low_rank_dtype = dtype if device.type == "cuda" else torch.promote_types(dtype, torch.float32)
    make = _factors if adapter_of_token is None else _factors_by_group
    factors = {n: make(each, experts.num_experts, low_rank_dtype) for n, each in adapters.items()}
    if by_kernel:
        weights = (*stored(experts.gate_up_proj), *stored(experts.down_proj))
        loras = (factors.get("gate_up_proj"), factors.get("down_proj"))
        output = routed_lora_cpu(x, row_weights, order // k, ends, weights, *loras)
        return output.to(hidden_states.dtype)
    expert = group // per_expert
    rows = _grouped(experts, x[order // k], expert, ends, group_ends, factors, dropout)  # (S, H)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    weighted = (rows * row_weights[:, None])[inverse]
    return weighted.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)


def _ends(group: Tensor, groups: int) -> Tensor:
    """Return (groups,), the end of each group's rows, from the sorted groups of all rows."""
    counted = group.float() if group.device.type in ("cpu", "mps") else group.int()
    # histc: bincount's output has a length that depends on values
    count = torch.histc(counted, bins=groups, min=0, max=groups - 1)
    return count.cumsum(0, dtype=torch.int32)


def _factors(
    adapters: Sequence[ExpertAdapter | None], num_experts: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Stack A (E, r, in) and B (E, r, out) of all adapters, with the scaling in B."""
    given = [each for each in adapters if each is not None]
    a = [each.lora_a.unflatten(0, (num_experts, -1)) for each in given]
    b = [
        each.lora_b.unflatten(1, (-1, num_experts)).permute(2, 1, 0).contiguous().to(dtype)
        * each.scaling
        for each in given
    ]
    if len(given) == 1:
        return a[0].to(dtype), b[0]
    return torch.cat(a, 1).to(dtype), torch.cat(b, 1)


def _factors_by_group(
    adapters: Sequence[ExpertAdapter | None], num_experts: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Lay out A (E * n, r, in) and B (E * n, r, out) of n - 1 adapters, and zeros for none.

    r is the largest rank; smaller ones end in zeros.
    """
    alone = [_factors([each], num_experts, dtype) if each else None for each in adapters]
    rank = max(each[0].shape[1] for each in alone if each)
    some = next(each for each in alone if each)
    padded = []
    for each in (*alone, None):
        a, b = each or tuple(torch.zeros_like(tensor) for tensor in some)
        padded.append([F.pad(tensor, (0, 0, 0, rank - tensor.shape[1])) for tensor in (a, b)])
    a, b = (torch.stack(tensors, 1).flatten(0, 1) for tensors in zip(*padded, strict=True))
    return a, b


def _fits_cpu_kernel(experts: Any, device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and experts.has_gate
        and not (experts.has_bias or experts.is_transposed)
        and type(experts)._apply_gate is _default_apply_gate
        and isinstance(experts.act_fn, nn.SiLU | SiLUActivation)
    )


class _FrozenGroupedLinear(torch.autograd.Function):
    """Grouped linear layer whose weights get no gradient, not even one that is thrown away.

    `scale` is that of int8 weights, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, ends: Tensor, is_transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, ends)
        ctx.is_transposed = is_transposed
        return _frozen_grouped_linear(x, weight, scale, ends, is_transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, ends = ctx.saved_tensors
        back = _frozen_grouped_linear(grads[0], weight, scale, ends, not ctx.is_transposed)
        return back, None, None, None, None


def _frozen_grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, ends: Tensor, is_transposed: bool
) -> Tensor:
    if scale is None:
        return _grouped_linear(x, weight.to(x.dtype), ends, is_transposed=is_transposed)
    return int8_grouped_linear(x.contiguous(), weight, scale, ends, is_transposed)


def _grouped(
    experts: Any,
    rows: Tensor,
    expert: Tensor,
    ends: Tensor,
    group_ends: Tensor,
    factors: dict[str, tuple[Tensor, Tensor]],
    dropout: float,
) -> Tensor:
    """(S, H) sorted by group -> (S, H), as transformers' grouped implementation."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    for name in (first, "down_proj"):
        weight, scale = stored(getattr(experts, name))
        projected = _FrozenGroupedLinear.apply(rows, weight, scale, ends, experts.is_transposed)
        if experts.has_bias:
            projected = projected + getattr(experts, f"{name}_bias")[expert].to(projected.dtype)
        if name in factors:
            a, b = factors[name]
            low_rank = _grouped_linear(F.dropout(rows, dropout).to(a.dtype), a, group_ends)
            added = _grouped_linear(low_rank, b, group_ends, is_transposed=True)
            projected = (projected + added).to(projected.dtype)
        if name == "down_proj":
            return projected
        rows = experts._apply_gate(projected) if experts.has_gate else experts.act_fn(projected)
    raise AssertionError("unreachable")
