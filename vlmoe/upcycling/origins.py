# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The origin of a tensor of the sparse model: copied, repeated, split, perturbed or drawn.

Making one tensor needs no other: a conversion can be done in any order, in parts, and again. What
is drawn at random depends on the seed and on the tensor's name alone.

Shapes: E experts, C copies, m shards of a copy, H hidden, I intermediate (of an expert in a bank).
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .options import Upcycling

Tensor = torch.Tensor


@dataclass(frozen=True)
class Piece:
    """A dense tensor, or some of its rows."""

    name: str
    rows: tuple[int, int] | None = None

    def of(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the piece of the dense model's weights; a view."""
        tensor = weights[self.name]
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class Origin:
    """The origin of a tensor of the sparse model.

    `kind`: copied, repeated (the same for each expert), split (among the shards of a copy),
    perturbed (repeated, then changed at random), extended (with rows for new tokens) or new.
    """

    kind: str
    sources: tuple[Piece, ...]
    make: Callable[..., Tensor]  # the sources -> the tensor, maybe an expanded view
    dtype: torch.dtype | None = None  # by default that of the sources

    def tensor(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Make the tensor from the dense model's weights."""
        made = self.make(*(piece.of(weights) for piece in self.sources))
        return made if self.dtype is None else made.to(self.dtype)


def drawn_router(
    name: str, shape: tuple[int, ...], split: int, std: float, seed: int, dtype: torch.dtype
) -> Origin:
    """Draw a router's weight (E, H); the `split` shards of a copy have equal rows."""

    def rows() -> Tensor:
        of_copies = torch.randn(shape[0] // split, shape[1], generator=seeded(name, seed))
        return (of_copies * std).repeat_interleave(split, dim=0)

    return Origin("new", (), rows, dtype)


def filled_bank(
    name: str, shape: tuple[int, ...], sources: tuple[Piece, ...], options: Upcycling
) -> Origin:
    """Fill a decoder's bank from dense weights: gate_up_proj (E, 2 I, H) or down_proj (E, H, I).

    Args:
        name: of the bank, which ends in `gate_up_proj` or `down_proj`.
        shape: of the bank.
        sources: gate and up (I, H) each, or down (H, I).
        options: of the conversion.
    """
    is_down = name.endswith("down_proj")
    if options.expert_split > 1:
        cut: Callable[..., Tensor] = _split_down if is_down else _split_gate_up
        split = options.expert_split
        return Origin("split", sources, lambda *dense: _repeat(cut(*dense, split), shape))
    if options.expert_init == "shared" and is_down:
        return Origin("new", sources, lambda down: torch.zeros(shape, dtype=down.dtype))
    if options.expert_init in ("drop", "noise"):
        return Origin("perturbed", sources, lambda *dense: _perturbed(name, dense, shape, options))
    return Origin("repeated", sources, lambda *dense: torch.cat(dense).expand(shape))


def _split_gate_up(gate: Tensor, up: Tensor, split: int) -> Tensor:
    """(I, H) each -> the shards of one copy, (m, 2 I / m, H), gate first."""
    return torch.cat([gate.unflatten(0, (split, -1)), up.unflatten(0, (split, -1))], dim=1)


def _split_down(down: Tensor, split: int) -> Tensor:
    """(H, I) -> the shards of one copy, (m, H, I / m), times m: each gets 1 / m of its weight."""
    return down.unflatten(1, (split, -1)).transpose(0, 1) * split


def _repeat(shards: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(m, ...) -> (C * m, ...): copy after copy."""
    return shards.repeat(shape[0] // shards.shape[0], 1, 1)


def _perturbed(
    name: str, dense: tuple[Tensor, ...], shape: tuple[int, ...], options: Upcycling
) -> Tensor:
    """Copy gate and up, or down, for each expert, and change each copy at random."""
    bank = torch.empty(shape, dtype=dense[0].dtype)
    inner = 1 if len(dense) == 1 else 0  # the dimension of the inner units in a dense weight
    layer = name.rpartition(".")[0]
    for expert, changed in enumerate(bank):
        draw = seeded(f"{name}:{expert}", options.seed)
        units = torch.rand(
            dense[0].shape[inner], generator=seeded(f"{layer}:{expert}", options.seed)
        )
        dropped = units.argsort()[: round(options.drop_ratio * len(units))]
        for weight, target in zip(dense, changed.chunk(len(dense)), strict=True):
            wide = weight.float()
            noise = torch.randn(wide.shape, generator=draw) * wide.std()
            if options.expert_init == "drop":
                drawn = (noise + wide.mean()).index_select(inner, dropped)
                target.copy_(wide.index_copy(inner, dropped, drawn))
            else:
                target.copy_(wide + options.noise_ratio * noise)
    return bank


def seeded(name: str, seed: int) -> torch.Generator:
    """Seed by the tensor's name, so that the order of the tensors does not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
