# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Facts of a saved model for its card, from its files: sizes, experts, parameters, images."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..configuration.tower_facts import tower_image_size
from ..processing.image_layout import TILING_OPTIONS
from .active_parameters import VISION_BANK, chosen_experts, parameter_counts
from .json_files import JsonObject
from .model_classes import is_native, model_class
from .provenance import saved_json

OUTSIDE_THE_DECODER = ("vision_num_experts", "projector_num_experts")
SHARED = ("num_shared_experts", "n_shared_experts", "moe_num_shared_experts")
_BANK = re.compile(r"\blayers\.(?P<layer>\d+)\..*\bexperts$")


@dataclass(frozen=True)
class ModelFacts:
    """The sizes that a card names.

    Attributes:
        native: the model is of a class of transformers.
        vision: `model_type` of the vision tower; None for a language model.
        num_layers: of the decoder.
        sparse_layers: those of them that have experts, counted from 0.
        has_experts: the decoder, the vision tower or the connector has.
        num_experts, top_k, width: of a sparse layer: its experts, those that a token is routed to,
            and the width of one.
        num_shared_experts: that every token passes through, where the configuration counts them.
        aux_loss, z_loss: coefficients of the router's losses; None where the class has none.
        hidden_size, vocab_size, max_position_embeddings: of the text model.
        image_size, image_tokens: pixels (height, width) and tokens of an image or tile; None where
            the vision tower takes any size.
        tiling: large images are cut into tiles.
    """

    native: bool
    vision: str | None
    num_layers: int
    sparse_layers: list[int]
    has_experts: bool
    num_experts: int
    top_k: int
    width: int
    num_shared_experts: int
    aux_loss: float | None
    z_loss: float | None
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int | None
    image_size: tuple[int, int] | None
    image_tokens: int | None
    tiling: bool


def model_facts(config: PreTrainedConfig, folder: Path) -> ModelFacts:
    """Collect the facts of a saved model from its configuration and its processor's.

    Raises:
        ValueError: transformers has no model for the configuration.
    """
    text = config.get_text_config()
    vision = getattr(config, "vision_config", None)
    sparse, experts, width = _experts(config)
    return ModelFacts(
        native=is_native(config),
        vision=getattr(vision, "model_type", None),
        num_layers=text.num_hidden_layers,
        sparse_layers=sparse,
        has_experts=bool(sparse) or any(getattr(config, f, 0) for f in OUTSIDE_THE_DECODER),
        num_experts=experts,
        top_k=chosen_experts(config) if sparse else 0,
        width=width,
        num_shared_experts=next((n for f in SHARED if (n := getattr(text, f, None))), 0),
        aux_loss=getattr(text, "router_aux_loss_coef", None),
        z_loss=getattr(text, "router_z_loss_coef", None),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_position_embeddings=getattr(text, "max_position_embeddings", None),
        **_images(config, folder),
    )


def parameters_of(config: PreTrainedConfig) -> dict[str, int]:
    """Count from the config alone, without memory for weights and without random numbers."""
    return parameter_counts(_skeleton(config))


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return model_class(config)(config)


def _experts(config: PreTrainedConfig) -> tuple[list[int], int, int]:
    """Return the sparse layers of the decoder, the experts of each, and the width of an expert."""
    if isinstance(config, VLMoEConfig):
        text = config.text_config
        layers = [i for i in range(text.num_hidden_layers) if text.is_sparse_layer(i)]
        return layers, text.num_experts, text.moe_intermediate_size
    found = {
        int(match["layer"]): bank
        for name, bank in _skeleton(config).get_decoder().named_modules()
        if (match := _BANK.search(name)) and VISION_BANK not in name
    }
    if not found:
        return [], 0, 0
    bank = next(iter(found.values()))
    experts, out, width = bank.down_proj.shape
    return sorted(found), experts, out if bank.is_transposed else width


def _images(config: PreTrainedConfig, folder: Path) -> JsonObject:
    """Return pixels and tokens of an image or tile, and whether large images are tiled."""
    processor = saved_json(folder / "processor_config.json") or {}
    alone = saved_json(folder / "preprocessor_config.json")  # as before transformers 5
    image_processor = processor.get("image_processor") or alone or {}
    tiling = any(image_processor.get(option) for option in TILING_OPTIONS)
    size = tokens = None
    vision = getattr(config, "vision_config", None)
    if not is_native(config) and getattr(vision, "image_size", None) is not None:
        size, tokens = tower_image_size(vision), processor.get("image_seq_len")
    return {"image_size": size, "image_tokens": tokens, "tiling": tiling}
