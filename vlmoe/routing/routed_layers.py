# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The sparse layers of any model: their experts, their router, their place.

A layer is found by its experts, a module under transformers' experts interface
(`@use_experts_implementation`), which is called with tokens, choice and weights. Its router is the
sibling called `gate` or `router`. Both hold for VLMoE, for transformers' own sparse models, for
these inside a container (LLaVA, InternVL), and inside the wrappers of PEFT and
DistributedDataParallel.
"""

import re
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

Place = Literal["decoder", "vision", "tower", "connector"]
"""`"vision"`: the bank for image and video tokens that ERNIE-4.5-VL has beside that for text."""

_ROUTER_NAMES = ("gate", "router")
_BIAS_NAMES = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class RoutedLayer:
    """One bank of experts and the router that chooses from it.

    Attributes:
        name: path of the experts' module in the model, without the names of PEFT's wrappers.
        index: number of the layer among those of its tower or decoder; 0 in a connector.
        place: where the bank is.
        experts: called with tokens (T, hidden), choice (T, k) and weights (T, k); the outermost of
            PEFT's wrappers, where there are some.
        router: called with tokens; its output holds logits (T, E), weights and choice (T, k).
        num_experts, top_k: E and k.
        block: the module that holds both.
    """

    name: str
    index: int
    place: Place
    experts: nn.Module
    router: nn.Module
    num_experts: int
    top_k: int
    block: nn.Module

    @property
    def is_one_of_two(self) -> bool:
        """Tell whether the bank sees a part of the tokens, as each of ERNIE's two does."""
        return self.place == "vision" or ".text_moe." in self.name


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """Find the sparse layers of a model, in the order of its modules.

    Raises:
        ValueError: there are none, or a bank has no router beside it; the message names the class.
    """
    modules = dict(model.named_modules())
    layers = []
    for name, module in modules.items():
        if "_is_expert_parallel" not in vars(module):  # what the interface sets on every bank
            continue
        outer = name
        while outer.endswith(".base_layer"):  # PEFT's wrappers of the bank's parameters
            outer = outer.removesuffix(".base_layer")
        block_name = outer.rpartition(".")[0]
        block = modules[block_name]
        router = next((getattr(block, n) for n in _ROUTER_NAMES if hasattr(block, n)), None)
        if router is None:
            raise ValueError(
                f"{type(block).__name__} ({block_name}) holds experts without a router beside them "
                f"({' or '.join(_ROUTER_NAMES)}): its routing cannot be read."
            )
        layers.append(
            RoutedLayer(
                name=outer,
                index=_layer_number(outer),
                place=_place(outer),
                experts=modules[outer],
                router=router,
                num_experts=_number_of_experts(module),
                top_k=_top_k(router, module),
                block=block,
            )
        )
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no experts under transformers' experts interface: it is "
            "dense, or its class computes its experts in its own way, as Llama 4's does."
        )
    return layers


def selection_bias(layer: RoutedLayer) -> torch.Tensor | None:
    """Return the numbers that the router adds to its scores where it chooses; None without them.

    (experts,) or (1, experts), under the name of the family: `e_score_correction_bias` (DeepSeek,
    GLM, MiniMax, VLMoE; in ERNIE's `moe_statics`) or `expert_bias` (LFM2, in the block). Where PEFT
    trains a copy of the router, the copy's.
    """
    found = [
        tensor
        for module in (layer.block, layer.router)
        for name, tensor in (*module.named_buffers(), *module.named_parameters())
        if name.rpartition(".")[2] in _BIAS_NAMES
    ]
    return found[-1] if found else None


def is_vlmoe(model: nn.Module) -> bool:
    """Return whether there is a VLMoE inside, by the class's name: code from the Hub keeps it."""
    return any(type(module).__name__.startswith("VLMoE") for module in model.modules())


def without_wrappers(module: nn.Module) -> nn.Module:
    """Return the module that PEFT's wrappers, if there are any, hold."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    original = getattr(module, "original_module", None)
    return original if isinstance(original, nn.Module) else module


def _number_of_experts(bank: nn.Module) -> int:
    """Return the experts of all ranks; under expert parallelism a bank names those of its rank."""
    if bank._is_expert_parallel:
        return next(bank.parameters()).shape[0]  # of the whole DTensor
    return int(cast(int, bank.num_experts))


def _layer_number(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    return numbers[-1] if numbers else 0


def _place(name: str) -> Place:
    if ".vision_moe." in f".{name}.":
        return "vision"
    if re.search(r"projector|connector", name):
        return "connector"
    return "tower" if re.search(r"vision|visual", name) else "decoder"


def _top_k(router: nn.Module, experts: nn.Module) -> int:
    router = without_wrappers(router)
    for holder in (router, experts, getattr(router, "config", None), experts.config):
        for field in ("top_k", "num_experts_per_tok", "top_k_experts"):
            if isinstance(value := getattr(holder, field, None), int):
                return value
    raise ValueError(f"{type(router).__name__} does not say how many experts it chooses.")
