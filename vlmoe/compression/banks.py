# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Banks of experts that can lose units or experts, for VLMoE and for models of transformers.

A unit of an expert is one row of its gate, the same row of its up projection, and one column of
its down projection. Banks here are laid out as most families have them under transformers' experts
interface: `gate_up_proj` (E, 2 I, H), gate first, `down_proj` (E, H, I), no bias. Others are
refused by name.

Shapes: E experts, I units of an expert (`moe_intermediate_size`), H hidden size, k experts per
token.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..modeling_vlmoe.quantization import quantized_experts
from ..routing.routed_layers import RoutedLayer, routed_layers, without_wrappers

Tensor = torch.Tensor
GATE_UP, DOWN = "gate_up_proj", "down_proj"
_PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "is_concatenated": True,
    "is_transposed": False,
    "has_post_expert_norm": False,
}
"""What the experts interface says of a bank in the layout of this module."""
_NUMBERS = ("num_experts", "n_routed_experts", "num_local_experts")
"""Attributes of routers, banks and blocks that hold the number of experts."""


def decoder_banks(model: PreTrainedModel) -> list[RoutedLayer]:
    """Return the sparse layers of the decoder, whose banks can be compressed.

    Raises:
        ValueError: there are none, or they are quantized, adapted, sharded or of another layout.
    """
    name = type(model).__name__
    layers = [layer for layer in routed_layers(model) if layer.place in ("decoder", "vision")]
    if not layers:
        raise ValueError(f"{name} has no experts in its decoder: there is nothing to compress.")
    if quantized_experts(model):
        raise ValueError(
            f"The experts of {name} are quantized: compress the model as it was before, and "
            "quantize the result."
        )
    for layer in layers:
        bank = layer.experts
        if without_wrappers(bank) is not bank:
            raise ValueError(
                f"{name} has an adapter on {layer.name}: merge it first (`vlmoe merge`, "
                "`merge_expert_lora`)."
            )
        if any(isinstance(each, DTensor) for each in bank.parameters()):
            raise ValueError(f"{layer.name} is sharded: compress the model in one process.")
        other = [key for key, value in _PLAIN.items() if getattr(bank, key) != value]
        if other or {key for key, _ in bank.named_parameters()} != {GATE_UP, DOWN}:
            found = ", ".join(f"{key}={getattr(bank, key)}" for key in other)
            raise ValueError(
                f"The experts of {name} ({type(bank).__name__}) are laid out in another way than "
                f"{GATE_UP} (E, 2 I, H) and {DOWN} (E, H, I)" + (f": {found}." if found else ".")
            )
        if layer.is_one_of_two:
            raise ValueError(f"{name} has one bank for text and one for images.")
    return layers


def down_of(bank: nn.Module) -> nn.Parameter:
    """Return the down projections of a bank, (E, H, I)."""
    return bank.get_parameter(DOWN)


def activations(bank: nn.Module, expert: int, tokens: Tensor) -> Tensor:
    """(T, H) -> (T, I): what the units of an expert give to its down projection."""
    apply_gate = cast(Callable[[Tensor], Tensor], bank._apply_gate)
    return apply_gate(F.linear(tokens, bank.get_parameter(GATE_UP)[expert]))


def keep_units(bank: nn.Module, kept: Tensor, down: Tensor) -> None:
    """Cut the experts of a bank down to some of their units, in place.

    Args:
        bank: with I units.
        kept: (E, units) long, the units of each expert that stay, in their new order.
        down: (E, H, units), the new down projections.
    """
    gate_up, width, units = bank.get_parameter(GATE_UP), down_of(bank).shape[-1], kept.shape[-1]
    rows = torch.cat([kept, kept + width], dim=1)  # (E, 2 units): gate, then up
    every = rows[..., None].expand(-1, -1, gate_up.shape[-1])
    _replace(bank, GATE_UP, gate_up.detach().gather(1, every))
    _replace(bank, DOWN, down.to(gate_up.dtype))
    for name, value in vars(bank).items():
        if value == width and name.startswith("intermediate"):
            setattr(bank, name, units)


def keep_experts(layer: RoutedLayer, kept: Sequence[int]) -> None:
    """Cut a layer's bank and its router down to some of the experts, in place."""
    index = torch.tensor(kept)
    bank = layer.experts
    for name in (GATE_UP, DOWN):
        _replace(bank, name, bank.get_parameter(name).detach()[index])
    keep_router_rows(layer.router, kept, layer.num_experts)
    for module in (layer.block, bank):
        _keep_rows(module, index, layer.num_experts)


def keep_router_rows(router: nn.Module, kept: Sequence[int], num_experts: int) -> None:
    """Cut a router down to some of its experts, in place: its weight, and what is added to it."""
    for module in router.modules():
        _keep_rows(module, torch.tensor(kept), num_experts)


def _keep_rows(module: nn.Module, index: Tensor, num_experts: int) -> None:
    """Cut what a module itself holds for each expert; banks are cut by `keep_experts`."""
    parameters = {} if hasattr(module, DOWN) else dict(module._parameters)
    for name, tensor in (*parameters.items(), *module._buffers.items()):
        if tensor is None or num_experts not in tensor.shape:
            continue
        # a bias by modality is (modalities, experts), a weight (experts, hidden)
        last = name in ("modality_bias", "allowed_experts") or tensor.shape[0] != num_experts
        rows = tensor.detach().index_select(tensor.dim() - 1 if last else 0, index)
        if name in parameters:
            _replace(module, name, rows)
        else:
            module._buffers[name] = rows.clone()
    for name in _NUMBERS:
        if vars(module).get(name) == num_experts:
            setattr(module, name, len(index))


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    learns = module.get_parameter(name).requires_grad
    setattr(module, name, nn.Parameter(tensor.contiguous(), requires_grad=learns))
