# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The connector: from the vision tower's features to image tokens of the decoder's width.

Shapes: tiles, patches (of one tile), channels (of the tower), hidden (of the decoder).
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..configuration.configuration_vlmoe import VLMoEConfig
from .vision_experts import VLMoEConnectorExperts, VLMoEVisionSparseMoeBlock


def pixel_shuffle(features: torch.Tensor, factor: int) -> torch.Tensor:
    """(tiles, patches, channels) -> (tiles, patches / factor**2, channels * factor**2).

    Each output token holds a square of `factor` x `factor` patches, row by row, as in InternVL and
    Idefics3.
    """
    tiles, patches, channels = features.shape
    side = int(patches**0.5)
    if side * side != patches or side % factor:
        raise ValueError(
            f"pixel_shuffle_factor={factor} needs a square grid of patches whose side it divides; "
            f"got {patches} patches. "
            "Choose another factor, or vision_feature_select_strategy='default' for a tower with a "
            "class token."
        )
    grid = features.view(tiles, side // factor, factor, side // factor, factor, channels)
    return grid.transpose(2, 3).reshape(tiles, patches // factor**2, channels * factor**2)


class VLMoEConnector(nn.Module):
    """Optional pixel shuffle and LayerNorm, then one linear (SmolVLM) or two (LLaVA, InternVL).

    With `projector_num_experts` a router and experts of two linears each replace the two (CuMo).
    """

    def __init__(self, config: VLMoEConfig):
        super().__init__()
        self.pixel_shuffle_factor = config.pixel_shuffle_factor
        hidden, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        width = config.connector_input_size
        self.layer_norm = nn.LayerNorm(width) if config.projector_layer_norm else nn.Identity()
        self.mlp = self.linear_2 = None
        if config.projector_num_experts:
            sizes, act = (width, hidden, hidden), config.projector_hidden_act
            experts = VLMoEConnectorExperts(config, config.projector_num_experts, sizes, act)
            self.mlp = VLMoEVisionSparseMoeBlock(experts, config, "projector")
            return
        self.linear_1 = nn.Linear(width, hidden, bias=bias)
        if config.projector_num_layers == 2:
            self.act = ACT2FN[config.projector_hidden_act]
            self.linear_2 = nn.Linear(hidden, hidden, bias=bias)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(tiles, patches, channels) -> (tiles, image tokens, hidden), alone in a tuple.

        With experts also router logits (tiles, image tokens, experts).
        """
        if self.pixel_shuffle_factor > 1:
            features = pixel_shuffle(features, self.pixel_shuffle_factor)
        features = self.layer_norm(features)
        if self.mlp is not None:
            return self.mlp(features)
        features = self.linear_1(features)
        return (features if self.linear_2 is None else self.linear_2(self.act(features)),)
