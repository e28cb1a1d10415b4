# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Plan the origin of each tensor of a native sparse model.

Dense and sparse classes of a family name their tensors alike, except for the bank. One rule fits
all: a tensor with the name and shape of a dense one is copied, a bank is filled from the dense MLP
of its layer, a router is drawn, a shared expert adds nothing, a selection bias is zero. Anything
else is refused, and so is a dense tensor that no sparse one is made of.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .options import Upcycling
from .origins import Origin, Piece, drawn_router, filled_bank

Tensor = torch.Tensor
LAYER = re.compile(r"^.*\blayers\.\d+\.")
MLP_NAMES = ("mlp.", "feed_forward.")
SPELLINGS = (
    ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    ("w1.weight", "w3.weight", "w2.weight"),
)  # of gate, up and down
ROUTERS = (".gate.weight", ".router.weight", ".gate.wg.weight")


@dataclass(frozen=True)
class DenseMLP:
    """The dense MLP of a layer: gate and up (I, H), down (H, I)."""

    gate: Piece
    up: Piece
    down: Piece


@dataclass(frozen=True)
class NativePlan:
    """A search for the origin of each tensor.

    Attributes:
        weights: the dense model's, under its own names; their values are not read.
        options: of the conversion.
        router_std: standard deviation of the routers' weights.
        dtype: of tensors that are new.
    """

    weights: Mapping[str, Tensor]
    options: Upcycling
    router_std: float
    dtype: torch.dtype

    def of(self, skeleton: Mapping[str, Tensor]) -> dict[str, Origin]:
        """Return the origin of every tensor; see `Target.plan`."""
        plan = {name: self.origin(name, tuple(t.shape)) for name, t in skeleton.items()}
        used = {piece.name for origin in plan.values() for piece in origin.sources}
        left = [name for name in self.weights if name not in used]
        if left:
            raise ValueError(
                f"The dense model has {', '.join(left[:3])}{' and others' * (len(left) > 3)}, "
                "which the sparse class cannot hold: the conversion would change its function."
            )
        return plan

    def origin(self, name: str, shape: tuple[int, ...]) -> Origin:
        """Return the origin of one tensor.

        Raises:
            ValueError: it has none.
        """
        if name in self.weights and tuple(self.weights[name].shape) == shape:
            return Origin("copied", (Piece(name),), lambda copied: copied)
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            mlp = self._mlp(name)
            sources = (mlp.down,) if name.endswith("down_proj") else (mlp.gate, mlp.up)
            return filled_bank(name, shape, sources, self.options)
        if name.endswith(ROUTERS):
            split, seed = self.options.expert_split, self.options.seed
            return drawn_router(name, shape, split, self.router_std, seed, self.dtype)
        raise ValueError(self._without_origin(name, shape))

    def _mlp(self, name: str) -> DenseMLP:
        """Find the dense MLP of the layer of a sparse tensor."""
        layer = LAYER.match(name)
        for mlp in MLP_NAMES if layer else ():
            for spelled in SPELLINGS:
                names = [f"{layer.group()}{mlp}{part}" for part in spelled]
                if set(names) <= set(self.weights):
                    return DenseMLP(*map(Piece, names))
        raise ValueError(f"Nothing in the dense model becomes {name}: its layer has no gated MLP.")

    def _without_origin(self, name: str, shape: tuple[int, ...]) -> str:
        given = self.weights.get(name)
        there = "" if given is None else f" (there it has the shape {tuple(given.shape)})"
        return f"Nothing in the dense model becomes {name} of shape {shape}{there}."
