# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The kind of each token: text, image, video or padding, for any model of transformers.

Shapes: B rows, T tokens of a forward pass.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedConfig

from ..configuration.configuration_vlmoe_text import Modality

Inputs: TypeAlias = Mapping[str, Any]
"""Arguments of a forward pass, by name."""
VIDEO = len(Modality)
"""The kind of a video token, as in `mm_token_type_ids`; text and image are those of `Modality`."""
KINDS = (*(modality.name for modality in Modality), "video")
"""Names of the kinds that hold content, by number."""
PADDING = len(KINDS)
"""The kind of a token that holds nothing."""


def has_video(config: PreTrainedConfig) -> bool:
    """Return whether a model takes videos."""
    return _token_id(config, "video") is not None


def token_kinds(inputs: Inputs, config: PreTrainedConfig) -> torch.Tensor:
    """Return each token's kind, (B, T) long.

    Args:
        inputs: the arguments of a forward pass of the backbone, by name.
        config: the backbone's.

    Raises:
        ValueError: the attention mask is not (B, T), so that padding cannot be found.
    """
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs["inputs_embeds"][..., 0]
    kinds = _modalities(inputs, tokens, config)
    padding = _padding(inputs, tokens, config.get_text_config().pad_token_id)
    return kinds if padding is None else torch.where(padding, PADDING, kinds)


def vision_bank_tokens(inputs: Inputs) -> torch.Tensor | None:
    """Return the tokens that ERNIE-4.5-VL sends to its bank for images and videos, (B, T) bool.

    None: there are none, or the model has one bank for all tokens.
    """
    types = inputs.get("moe_mm_token_type_ids")
    return types.bool() if types is not None and types.any() else None


def _modalities(inputs: Inputs, tokens: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """(B, T): numbers of `KINDS`; a token decoded with a cache is text."""
    types = inputs.get("mm_token_type_ids")
    if types is not None and types.shape != tokens.shape:
        types = None
    if inputs.get("input_ids") is None:
        if types is None:
            return torch.zeros_like(tokens, dtype=torch.long)
        return torch.where(types <= VIDEO, types, 0).long()  # audio counts as text
    kinds = _equal(tokens, _token_id(config, "image")).long()
    video = _token_id(config, "video")
    if video is None:
        return kinds
    is_video = tokens == video
    if types is not None:  # GLM-4V writes the frames of a video with its image token
        is_video = is_video | (types == VIDEO)
    return torch.where(is_video, VIDEO, kinds)


def _equal(tokens: torch.Tensor, token_id: int | None) -> torch.Tensor:
    return tokens == (-1 if token_id is None else token_id)


def _token_id(config: PreTrainedConfig, kind: str) -> int | None:
    names = (f"{kind}_token_id", f"{kind}_token_index")
    return next((i for n in names if isinstance(i := getattr(config, n, None), int)), None)


def _padding(inputs: Inputs, tokens: torch.Tensor, pad_token_id: int | None) -> torch.Tensor | None:
    """(B, T): True for padding; None if there is none.

    `generate` fills rows that have ended with the padding token, and its mask calls it real.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError(
            "Recording the routing needs a (batch, length) attention mask to leave out padding."
        )
    seen = mask.shape[1] - tokens.shape[1]  # by the cache
    padding = (mask[:, seen:] if seen else mask) == 0
    if seen and tokens.shape[1] == 1 and inputs.get("input_ids") is not None:
        padding = padding | _equal(tokens, pad_token_id)
    return padding
