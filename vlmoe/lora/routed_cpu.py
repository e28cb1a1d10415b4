# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Compute adapted experts on a CPU, expert by expert, in blocks of rows that stay in cache.

Rows are the (token, choice) pairs, sorted by expert; `ends[e]` is the end of expert e's rows. A
block holds the rows of some neighboring experts: matrix products run for each expert, all other
operations for the block, so that many experts with few rows cost few calls.

The forward pass saves the projections before the activation and the products of rank r; the
backward pass recomputes the activation, which is cheap. Base weights are frozen: neither a gradient
of their shape nor an adapted copy is ever made. In int8 they are dequantized one expert at a time
(int8.py). Products of rank r and sums over experts are in at least fp32: rounding errors in such a
small space do not average out.

Both passes are operators of torch's library, opaque to torch.compile: the numbers of rows of the
experts are read on the host, and each product has another shape.

Shapes: T tokens, S rows = T * k, R rows of a block, E experts, H hidden, I intermediate, r rank.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .int8 import Int8Experts

Tensor = torch.Tensor


BLOCK = 256  # from this number of rows on, an expert gets a separate block


class _Block(NamedTuple):
    """Neighbouring experts that have rows, and how many each."""

    rows: slice
    experts: list[int]
    sizes: list[int]


class _Projection(NamedTuple):
    """One projection of the bank, by expert: W (out, in), A (r, in), B (r, out)."""

    weights: tuple[Tensor, ...] | Int8Experts
    width: int  # in
    a: tuple[Tensor, ...] | None
    b: tuple[Tensor, ...] | None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        scale: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        dtype: torch.dtype,
    ) -> "_Projection":
        """`scale` is that of int8 weights, which are read in `dtype`."""
        weights = weight.unbind() if scale is None else Int8Experts(weight, scale, dtype)
        low_rank = (None if each is None else each.unbind() for each in (a, b))
        return cls(weights, weight.shape[2], *low_rank)


def _blocks(ends: Tensor) -> Iterator[_Block]:
    start, end, experts, sizes = 0, 0, [], []  # type: int, int, list[int], list[int]
    for expert, next_end in enumerate(ends.tolist()):
        if next_end == end:
            continue
        if experts and next_end - start > BLOCK:
            yield _Block(slice(start, end), experts, sizes)
            start, experts, sizes = end, [], []
        experts.append(expert)
        sizes.append(next_end - end)
        end = next_end
    if experts:
        yield _Block(slice(start, end), experts, sizes)


def _project(block: _Block, x: Tensor, by: _Projection, out: Tensor, low_rank: Tensor) -> None:
    """x W^T + (x A^T) B into `out` (R, out), x A^T into `low_rank` (R, r)."""
    each = (block.experts, x.split(block.sizes), out.split(block.sizes))
    for expert, x_e, out_e in zip(*each, strict=True):
        torch.mm(x_e, by.weights[expert].to(x.dtype).T, out=out_e)
    if by.a is not None and by.b is not None:
        wide = x.to(low_rank.dtype).split(block.sizes)
        low = low_rank.split(block.sizes)
        for expert, x_e, low_e, out_e in zip(block.experts, wide, low, each[2], strict=True):
            torch.mm(x_e, by.a[expert].T, out=low_e)
            out_e.addmm_(low_e.to(x.dtype), by.b[expert].to(x.dtype))


def _project_back(
    block: _Block,
    grad: Tensor,
    by: _Projection,
    low_rank: Tensor,
    scale: Tensor | None = None,
    grad_b: Tensor | None = None,
    needs_x: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """From the gradient of `_project`'s `out` those of x and of x A^T; that of B into `grad_b`.

    Args:
        block, grad, by: the block, the gradient (R, out), the projection.
        low_rank: as `_project` wrote it.
        scale: (R, 1), a factor of `grad` that only B's gradient applies here.
        grad_b: (E, r, out).
        needs_x: whether the gradient of x is wanted; it is empty if not.
    """
    sizes, experts = block.sizes, block.experts
    grad_x = grad.new_empty(len(grad) if needs_x else 0, by.width)
    parts = grad_x.split(sizes) if needs_x else ()
    for expert, grad_e, out_e in zip(experts, grad.split(sizes), parts, strict=False):
        torch.mm(grad_e, by.weights[expert].to(grad.dtype), out=out_e)
    if by.a is None or by.b is None or grad_b is None:
        return grad_x, None
    back = torch.empty_like(low_rank)
    scaled = (low_rank if scale is None else low_rank * scale).split(sizes)
    each = (experts, grad.to(low_rank.dtype).split(sizes), scaled, back.split(sizes))
    for i, (expert, grad_e, low_e, back_e) in enumerate(zip(*each, strict=True)):
        torch.mm(grad_e, by.b[expert].T, out=back_e)
        torch.mm(low_e.T, grad_e, out=grad_b[expert])
        if needs_x:
            parts[i].addmm_(back_e.to(grad.dtype), by.a[expert].to(grad.dtype))
    return grad_x, back if scale is None else back * scale


def _grad_a(block: _Block, back: Tensor | None, x: Tensor, grad_a: Tensor) -> None:
    """Return the gradient of A (E, r, in) from that of x A^T (R, r)."""
    if back is not None:
        each = (block.experts, back.split(block.sizes), x.to(back.dtype).split(block.sizes))
        for expert, back_e, x_e in zip(*each, strict=True):
            torch.mm(back_e.T, x_e, out=grad_a[expert])


@torch.library.custom_op("vlmoe::routed_lora", mutates_args=())
def _routed_lora(
    x: Tensor,
    row_weights: Tensor,
    token: Tensor,
    ends: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width, hidden_size = token.shape[0], gate_up.shape[1], x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    output = x.new_zeros(x.shape, dtype=wide)
    before = x.new_empty(rows if save else 0, width)
    ranks = [0 if a is None else a.shape[1] for a in (gate_up_a, down_a)]
    low_in, low_out = (x.new_empty(rows, rank, dtype=wide) for rank in ranks)
    first = _Projection.of(gate_up, gate_up_scale, gate_up_a, gate_up_b, x.dtype)
    second = _Projection.of(down, down_scale, down_a, down_b, x.dtype)
    with torch.autocast("cpu", enabled=False):
        for block in _blocks(ends):
            own, where = block.rows, token[block.rows]
            projected = before[own] if save else x.new_empty(len(where), width)
            _project(block, x[where], first, projected, low_in[own])
            gate, up = projected.chunk(2, dim=-1)
            y = x.new_empty(len(where), hidden_size)
            _project(block, F.silu(gate).mul_(up), second, y, low_out[own])
            output.index_add_(0, where, y.to(wide).mul_(row_weights[own, None]))
    return output, before, low_in, low_out


@_routed_lora.register_fake
def _(
    x: Tensor,
    row_weights: Tensor,
    token: Tensor,
    ends: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = token.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    ranks = [0 if a is None else a.shape[1] for a in (gate_up_a, down_a)]
    low_in, low_out = (x.new_empty(rows, rank, dtype=wide) for rank in ranks)
    before = x.new_empty(rows if save else 0, gate_up.shape[1])
    return x.new_empty(x.shape, dtype=wide), before, low_in, low_out


@torch.library.custom_op("vlmoe::routed_lora_backward", mutates_args=())
def _routed_lora_backward(
    grad_output: Tensor,
    x: Tensor,
    row_weights: Tensor,
    token: Tensor,
    ends: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    before: Tensor,
    low_in: Tensor,
    low_out: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # An expert without rows gets a gradient of zero.
    adapters = [
        x.new_zeros(0) if each is None else torch.zeros_like(each)
        for each in (gate_up_a, gate_up_b, down_a, down_b)
    ]
    grad_gate_up_a, grad_gate_up_b, grad_down_a, grad_down_b = adapters
    grad_weights = torch.empty_like(row_weights)
    wide = grad_output.dtype  # at least fp32
    grad_x = grad_output.new_zeros(grad_output.shape if needs_x else 0)
    first = _Projection.of(gate_up, gate_up_scale, gate_up_a, gate_up_b, x.dtype)
    second = _Projection.of(down, down_scale, down_a, down_b, x.dtype)
    with torch.autocast("cpu", enabled=False):
        for block in _blocks(ends):
            own, where = block.rows, token[block.rows]
            weight = row_weights[own, None].to(wide)
            gate, up = before[own].chunk(2, dim=-1)
            activated = F.silu(gate)
            hidden = activated * up
            # Not yet times the routing weights, whose own gradient is <grad hidden, hidden>.
            grad = grad_output[where].to(x.dtype)
            grad_hidden, back = _project_back(
                block, grad, second, low_out[own], weight, grad_down_b
            )
            _grad_a(block, back, hidden, grad_down_a)
            grad_weights[own] = torch.linalg.vecdot(grad_hidden.to(wide), hidden.to(wide)).to(
                row_weights.dtype
            )
            grad_hidden.mul_(weight)
            grad_before = before.new_empty(len(where), before.shape[1])
            grad_gate, grad_up = grad_before.chunk(2, dim=-1)
            torch.mul(grad_hidden, activated, out=grad_up)
            grad_gate.copy_(torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate))
            grad_rows, back = _project_back(
                block, grad_before, first, low_in[own], None, grad_gate_up_b, needs_x
            )
            _grad_a(block, back, x[where] if back is not None else x, grad_gate_up_a)
            if needs_x:
                grad_x.index_add_(0, where, grad_rows.to(wide))
    return grad_x, grad_weights, adapters[0], adapters[1], adapters[2], adapters[3]


@_routed_lora_backward.register_fake
def _(
    grad_output: Tensor,
    x: Tensor,
    row_weights: Tensor,
    token: Tensor,
    ends: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    before: Tensor,
    low_in: Tensor,
    low_out: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    adapters = [
        x.new_empty(0) if each is None else torch.empty_like(each)
        for each in (gate_up_a, gate_up_b, down_a, down_b)
    ]
    grad_x = grad_output.new_empty(grad_output.shape if needs_x else 0)
    grad_weights = torch.empty_like(row_weights)
    return grad_x, grad_weights, adapters[0], adapters[1], adapters[2], adapters[3]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(
        False
    )  # saved tensors have no gradient, and zeros of their size would cost
    ctx.save_for_backward(*inputs[:-1], *output[1:])


def _backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, *rest = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if grad_output is None:
        return tuple(None for _ in needs)
    grads = torch.ops.vlmoe.routed_lora_backward(grad_output.contiguous(), x, *rest, bool(needs[0]))
    grad_x, grad_weights, *adapters = grads
    grad_x = grad_x.to(x.dtype) if needs[0] else None
    inputs = (grad_x, grad_weights, *(None,) * 6, *adapters, None)
    return tuple(g if needed else None for g, needed in zip(inputs, needs, strict=True))


_routed_lora.register_autograd(_backward, setup_context=_setup_context)


def routed_lora_cpu(
    x: Tensor,
    row_weights: Tensor,
    token: Tensor,
    ends: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    gate_up_lora: tuple[Tensor, Tensor] | None,
    down_lora: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(T, H) -> (T, H): silu-gated experts with their adapters, in at least fp32.

    Args:
        x: (T, H), in the dtype to compute in.
        row_weights: (S,) routing weights of the rows, which are sorted by expert.
        token: (S,) the token of each row.
        ends: (E,) where each expert's rows end.
        weights: gate_up (E, 2 I, H), its scales, down (E, H, I), its scales; frozen. Weights are of
            any floating dtype and scales None, or weights are int8 and scales (E, rows, 1).
        gate_up_lora, down_lora: A (E, r, in) and B (E, r, out), scaling included, in x's dtype or,
            where that has low precision, in fp32.
    """
    gate_up_a, gate_up_b = gate_up_lora or (None, None)
    down_a, down_b = down_lora or (None, None)
    differentiable = (x, row_weights, gate_up_a, gate_up_b, down_a, down_b)
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in differentiable
    )
    arguments = (gate_up_a, gate_up_b, down_a, down_b, save)
    return _routed_lora(x, row_weights, token, ends, *weights, *arguments)[0]
