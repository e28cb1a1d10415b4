# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The origin of a tensor of the sparse model: copied, repeated, split, perturbed or drawn.

Making one tensor needs no other: a conversion can be done in any order, in parts, and again. What
is drawn at random depends on the seed and on the tensor's name alone.

Shapes: E experts, C copies, m shards of a copy, H hidden, I intermediate (of an expert in a bank).
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

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
    make_expert: Callable[..., Tensor] | None = None  # of a bank: an index, the sources -> a slice

    def tensor(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Make the tensor from the dense model's weights."""
        made = self.make(*(piece.of(weights) for piece in self.sources))
        return made if self.dtype is None else made.to(self.dtype)

    def expert(self, weights: Mapping[str, Tensor], index: int) -> Tensor:
        """Make the slice of one expert of a bank, without the others where that is possible."""
        if self.make_expert is None:
            return self.tensor(weights)[index]
        made = self.make_expert(index, *(piece.of(weights) for piece in self.sources))
        return made if self.dtype is None else made.to(self.dtype)

    def stored_dtype(self, weights: Mapping[str, Tensor]) -> torch.dtype:
        """Return the dtype of the tensor; its values are not made."""
        return self.dtype or self.sources[0].of(weights).dtype


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
    if is_down and options.expert_init == "shared":
        zero = Origin("new", sources, lambda down: down.new_zeros(()).expand(shape))
        return replace(zero, make_expert=lambda index, down: down.new_zeros(shape[1:]))
    if options.expert_split > 1:
        kind = "split"
        cut: Callable[..., Tensor] = _shard_of_down if is_down else _shard_of_gate_up

        def make_expert(index: int, *dense: Tensor) -> Tensor:
            return cut(*dense, options.expert_split, index % options.expert_split)

    elif options.expert_init in ("drop", "noise"):
        kind = "perturbed"

        def make_expert(index: int, *dense: Tensor) -> Tensor:
            return _perturbed(name, index, dense, options)

    else:
        one = Origin("repeated", sources, lambda *dense: torch.cat(dense).expand(shape))
        return replace(one, make_expert=lambda index, *dense: torch.cat(dense))

    def make(*dense: Tensor) -> Tensor:
        bank = torch.empty(shape, dtype=dense[0].dtype)
        for index, expert in enumerate(bank):
            expert.copy_(make_expert(index, *dense))
        return bank

    return Origin(kind, sources, make, make_expert=make_expert)


def _shard_of_gate_up(gate: Tensor, up: Tensor, split: int, shard: int) -> Tensor:
    """(I, H) each -> one shard of a copy, (2 I / m, H), gate first."""
    return torch.cat([each.unflatten(0, (split, -1))[shard] for each in (gate, up)])


def _shard_of_down(down: Tensor, split: int, shard: int) -> Tensor:
    """(H, I) -> one shard of a copy, (H, I / m), times m: each gets 1 / m of its weight."""
    return down.unflatten(1, (split, -1))[:, shard] * split


def _perturbed(name: str, index: int, dense: tuple[Tensor, ...], options: Upcycling) -> Tensor:
    """Copy gate and up, or down, for one expert, and change the copy at random."""
    inner = 1 if len(dense) == 1 else 0  # the dimension of the inner units in a dense weight
    layer, changed = name.rpartition(".")[0], []
    draw = seeded(f"{name}:{index}", options.seed)
    units = torch.rand(dense[0].shape[inner], generator=seeded(f"{layer}:{index}", options.seed))
    dropped = units.argsort()[: round(options.drop_ratio * len(units))]
    for weight in dense:
        wide = weight.float()
        noise = torch.randn(wide.shape, generator=draw) * wide.std()
        if options.expert_init == "drop":
            drawn = (noise + wide.mean()).index_select(inner, dropped)
            changed.append(wide.index_copy(inner, dropped, drawn).to(weight.dtype))
        else:
            changed.append((wide + options.noise_ratio * noise).to(weight.dtype))
    return torch.cat(changed)


def seeded(name: str, seed: int) -> torch.Generator:
    """Seed by the tensor's name, so that the order of the tensors does not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
