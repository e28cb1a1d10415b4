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

from .native_pairs import Pair
from .options import Upcycling
from .origins import Origin, Piece, drawn_router, filled_bank

Tensor = torch.Tensor
LAYER = re.compile(r"^.*\blayers\.\d+\.")
MLP_NAMES = ("mlp.", "feed_forward.")
SPELLINGS = (
    ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    ("w1.weight", "w3.weight", "w2.weight"),
)  # of gate, up and down
FUSED = "gate_up_proj.weight", "down_proj.weight"  # gate above up
BANKS = (".experts.gate_up_proj", ".experts.down_proj")
ROUTERS = (".gate.weight", ".router.weight", ".gate.wg.weight", ".router.proj.weight")
BIASES = (".e_score_correction_bias", ".expert_bias")
SHARED_GATE = ".shared_expert_gate.weight"
SHARED = re.compile(r"\.(?:shared_expert|shared_experts|shared_mlp)\.(\w+)\.weight$")
SILENT = {
    ".router.scale": torch.ones,
    ".router.per_expert_scale": torch.ones,
    ".post_feedforward_layernorm_1.weight": torch.ones,
    ".post_feedforward_layernorm_2.weight": torch.zeros,
}  # of Gemma 4's branch beside the dense MLP, which its last norm silences
COPIED_NORM = ".pre_feedforward_layernorm_2.weight", ".pre_feedforward_layernorm.weight"


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
        pair: of the text models.
        options: of the conversion.
        router_std: standard deviation of the routers' weights.
        dtype: of tensors that are new.
    """

    weights: Mapping[str, Tensor]
    pair: Pair
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
        found = None
        if name.endswith(BANKS):
            found = self._bank(name, shape)
        elif shared := SHARED.search(name):
            found = self._shared(name, shared.group(1), shape)
        elif name.endswith(ROUTERS):
            split, seed = self.options.expert_split, self.options.seed
            found = drawn_router(name, shape, split, self.router_std, seed, self.dtype)
        elif name.endswith(BIASES):
            found = Origin("new", (), lambda: torch.zeros(shape), torch.float32)
        elif name.endswith(SHARED_GATE):
            found = Origin("new", (), lambda: torch.zeros(shape), self.dtype)
        elif self.pair.silent_branch:
            found = self._silent(name, shape)
        elif ".self_attn." in name:
            found = self._cut_qkv(name, shape)
        if found is None:
            raise ValueError(self._without_origin(name, shape))
        return found

    def _bank(self, name: str, shape: tuple[int, ...]) -> Origin | None:
        mlp, split = self._mlp(name), self.options.expert_split
        sources = (mlp.down,) if name.endswith("down_proj") else (mlp.gate, mlp.up)
        width, hidden = mlp.gate.of(self.weights).shape
        of_expert = {1: (hidden, width // split), 2: (2 * (width // split), hidden)}
        if shape[1:] != of_expert[len(sources)]:
            return None
        return filled_bank(name, shape, sources, self.options)

    def _shared(self, name: str, part: str, shape: tuple[int, ...]) -> Origin | None:
        """Copy the dense MLP if the options ask for that; else zero the output of its first rows.

        The gate of a gated shared expert starts at zero, and its sigmoid at 1/2: `down_proj` is
        doubled, which is exact.
        """
        mlp, asked = self._mlp(name), self.options.expert_init == "shared"
        if part in ("down_proj", "output_linear"):
            if not asked:
                return Origin("new", (), lambda: torch.zeros(shape), self.dtype)
            factor = 2 if self.pair.shared is not None and self.pair.shared.gated else 1
            return Origin("copied", (mlp.down,), lambda down: down * factor)
        parts = {"gate_proj": [mlp.gate], "up_proj": [mlp.up], "input_linear": [mlp.gate, mlp.up]}
        if part not in parts:
            return None
        rows = shape[0] // len(parts[part])
        return Origin(
            "copied", tuple(parts[part]), lambda *dense: torch.cat([each[:rows] for each in dense])
        )

    def _silent(self, name: str, shape: tuple[int, ...]) -> Origin | None:
        """Make the norms and scales of a branch that adds nothing yet."""
        new, old = COPIED_NORM
        if name.endswith(new):
            return Origin("copied", (Piece(name.replace(new, old)),), lambda copied: copied)
        make = next((make for end, make in SILENT.items() if name.endswith(end)), None)
        return None if make is None else Origin("new", (), lambda: make(shape), self.dtype)

    def _cut_qkv(self, name: str, shape: tuple[int, ...]) -> Origin | None:
        """Cut a projection from a fused one (Phi-3): queries, then keys, then values."""
        prefix, _, rest = name.rpartition("self_attn.")
        fused = f"{prefix}self_attn.qkv_proj.{rest.partition('.')[2]}"
        part = rest.partition(".")[0]
        if fused not in self.weights or part not in ("q_proj", "k_proj", "v_proj"):
            return None
        rows, count = self.weights[fused].shape[0], shape[0]
        end = {"q_proj": count, "k_proj": rows - count, "v_proj": rows}[part]
        return Origin("copied", (Piece(fused, (end - count, end)),), lambda copied: copied)

    def _mlp(self, name: str) -> DenseMLP:
        """Find the dense MLP of the layer of a sparse tensor."""
        layer = LAYER.match(name)
        for mlp in [f"{layer.group()}{each}" for each in MLP_NAMES] if layer else ():
            for spelled in SPELLINGS:
                names = [mlp + part for part in spelled]
                if set(names) <= set(self.weights):
                    return DenseMLP(*map(Piece, names))
            fused, down = (mlp + part for part in FUSED)
            if fused in self.weights and down in self.weights:
                width = self.weights[down].shape[1]
                gate, up = Piece(fused, (0, width)), Piece(fused, (width, 2 * width))
                return DenseMLP(gate, up, Piece(down))
        raise ValueError(f"Nothing in the dense model becomes {name}: its layer has no gated MLP.")

    def _without_origin(self, name: str, shape: tuple[int, ...]) -> str:
        given = self.weights.get(name)
        there = "" if given is None else f" (there it has the shape {tuple(given.shape)})"
        return f"Nothing in the dense model becomes {name} of shape {shape}{there}."
