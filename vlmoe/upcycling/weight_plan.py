# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Plan the origin of each tensor of a VLMoE.

`plan_weights` gives an `Origin` for every tensor of the sparse model, which names its dense
sources and makes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..configuration.configuration_vlmoe import VLMoEConfig
from .options import Upcycling
from .origins import Origin, Piece, drawn_router, filled_bank, seeded

Tensor = torch.Tensor
RENAMED = (
    ("model.vision_model.", "model.vision_tower."),
    ("model.connector.modality_projection.proj.", "model.multi_modal_projector.linear_1."),
    ("model.text_model.", "model.language_model."),
    *(
        (f"model.{part}", f"model.language_model.{part}")
        for part in ("layers.", "norm.", "embed_tokens.")
    ),
)
DECODER = "model.language_model."
EMBEDDING, HEAD = f"{DECODER}embed_tokens.weight", "lm_head.weight"


def dense_pieces(weights: Mapping[str, Tensor], config: VLMoEConfig) -> dict[str, Piece]:
    """Return the dense tensors under VLMoE's names; cut Phi-3's fused projections.

    Args:
        weights: the dense model's, under its own names; their values are not read.
        config: of the sparse model.
    """
    text, pieces = config.text_config, {}
    queries, keys = (
        heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads)
    )
    width = text.intermediate_size
    fused = {
        ".qkv_proj.": (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)),
        ".mlp.gate_up_proj.": (("mlp.gate_proj", width), ("mlp.up_proj", width)),
    }
    for dense_name in weights:
        name = _renamed(dense_name)
        key = next((key for key in fused if name.startswith(DECODER) and key in name), None)
        if key is None:
            pieces[name] = Piece(dense_name)
            continue
        start = 0
        for part, rows in fused[key]:
            pieces[name.replace(key, f".{part}.")] = Piece(dense_name, (start, start + rows))
            start += rows
    return pieces


def _renamed(name: str) -> str:
    for old, new in RENAMED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@dataclass(frozen=True)
class _Planner:
    """A search for the origin of each tensor; for the fields see `plan_weights`."""

    weights: Mapping[str, Tensor]
    pieces: Mapping[str, Piece]
    config: VLMoEConfig
    options: Upcycling
    dtype: torch.dtype
    new_parts: tuple[str, ...]

    def origin(self, name: str, shape: tuple[int, ...]) -> Origin:
        if name in self.pieces:
            return self._copied(name, shape)
        if ".router." in name:
            return self._router(name, shape)
        if self.new_parts and name.startswith(self.new_parts):
            seed, std = self.options.seed, self.config.text_config.initializer_range
            return Origin("new", (), lambda: _new_weight(name, shape, std, seed), self.dtype)
        if ".shared_experts." in name:
            sources = [name.replace(".shared_experts.", ".")]
        else:
            sources = _expert_sources(*name.split(".experts.")) if ".experts." in name else []
        if not sources or not set(sources) <= set(self.pieces):
            raise ValueError(f"Nothing in the dense model becomes {name} of shape {shape}.")
        found = tuple(self.pieces[source] for source in sources)
        if ".shared_experts." in name:
            return Origin("copied", found, lambda copied: copied)
        return self._experts(name, shape, found)

    def _copied(self, name: str, shape: tuple[int, ...]) -> Origin:
        piece = self.pieces[name]
        given = tuple(piece.of(self.weights).shape)
        if given == shape:
            return Origin("copied", (piece,), lambda copied: copied)
        if name not in (EMBEDDING, HEAD) or given[0] > shape[0]:
            raise ValueError(f"{piece.name} has the shape {given}, but {name} has {shape}.")
        return Origin("extended", (piece,), lambda rows: _with_mean_rows(rows, shape[0]))

    def _router(self, name: str, shape: tuple[int, ...]) -> Origin:
        """Draw weights, equal for the shards of a copy; biases start at zero."""
        if not name.endswith(".weight"):
            in_fp32 = name.endswith("e_score_correction_bias")
            dtype = torch.float32 if in_fp32 else self.dtype
            return Origin("new", (), lambda: torch.zeros(shape), dtype)
        std, seed = self.options.router_std, self.options.seed
        std = self.config.text_config.initializer_range if std is None else std
        split = self.options.expert_split if name.startswith(DECODER) else 1
        return drawn_router(name, shape, split, std, seed, self.dtype)

    def _experts(self, name: str, shape: tuple[int, ...], sources: tuple[Piece, ...]) -> Origin:
        """Fill a bank; those of tower and connector hold copies, whatever the options say."""
        if name.startswith(DECODER):
            return filled_bank(name, shape, sources, self.options)
        one = Origin("repeated", sources, lambda dense: dense.expand(shape))
        return replace(one, make_expert=lambda index, dense: dense)


def plan_weights(
    target: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    config: VLMoEConfig,
    options: Upcycling,
    dtype: torch.dtype,
    new_parts: tuple[str, ...] = (),
) -> dict[str, Origin]:
    """Return the origin of every tensor of the sparse model.

    Args:
        target: the sparse model's parameters and saved buffers; their values are not read.
        weights: the dense model's, under its own names.
        config, options: of the sparse model.
        dtype: of tensors that are new.
        new_parts: beginnings of the names of tensors that may be new, besides routers.

    Raises:
        ValueError: a tensor of the dense model has no place, or one of the sparse model no origin.
    """
    pieces = dense_pieces(weights, config)
    planner = _Planner(weights, pieces, config, options, dtype, new_parts)
    plan = {name: planner.origin(name, tuple(tensor.shape)) for name, tensor in target.items()}
    used = {piece for origin in plan.values() for piece in origin.sources}
    tied = {HEAD} if config.tie_word_embeddings else set()
    left = [name for name, piece in pieces.items() if piece not in used and name not in tied]
    if left:
        raise ValueError(
            f"The dense model has {', '.join(left[:3])}{' and others' * (len(left) > 3)}, which "
            "VLMoE cannot hold: the conversion would change its function."
        )
    return plan


def _expert_sources(mlp: str, bank: str) -> list[str]:
    """Name the dense weights of a bank in decoder, vision tower or connector."""
    if mlp.startswith(DECODER):
        parts = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}
        return [f"{mlp}.{part}.weight" for part in parts.get(bank, [])]
    is_connector = mlp == "model.multi_modal_projector.mlp"
    names = ("linear_1", "linear_2") if is_connector else ("fc1", "fc2")
    part = names[0] if bank.startswith("up_proj") else names[1]
    kind = "bias" if bank.endswith("_bias") else "weight"
    return [f"{mlp.removesuffix('.mlp') if is_connector else mlp}.{part}.{kind}"]


def _with_mean_rows(rows: Tensor, count: int) -> Tensor:
    """Extend token embeddings by the mean of all for each new token."""
    if count <= len(rows):
        return rows[:count]
    mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(count - len(rows), -1)])


def _new_weight(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Initialize as VLMoE initializes linears and norms."""
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    return torch.randn(shape, generator=seeded(name, seed)) * std
