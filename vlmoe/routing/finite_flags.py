# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Whether router logits were finite: one flag per router, on its device.

Top-k chooses experts among NaN scores, too, without an error. Raising a flag costs the forward pass
no wait and no break in a compiled graph; finite_checks.py reads all of them at once.
"""

import torch
from transformers import PreTrainedModel

from .kinds import Inputs
from .record import Routing
from .routed_layers import RoutedLayer


class RoutingFlags:
    """For each layer, whether its router's logits were not finite in training; a `Reader`.

    Padding counts, since 0 * NaN would reach the gradients.

    Args:
        layers: of a model.

    Attributes:
        flags: () bool by the layer's name; None before its router was first seen.
    """

    def __init__(self, layers: list[RoutedLayer]) -> None:
        self.layers = layers
        self.flags: dict[str, torch.Tensor | None] = {layer.name: None for layer in layers}

    def begin(self, backbone: PreTrainedModel, inputs: Inputs) -> bool:
        """Read the forward passes of training."""
        return backbone.training and torch.is_grad_enabled()

    @torch.no_grad()
    def read(self, layer: RoutedLayer, routing: Routing) -> None:
        """Set the layer's flag, on its device."""
        if routing.logits is None:
            return
        found = routing.logits.isfinite().all().logical_not()
        flag = self.flags[layer.name]
        if flag is None or flag.device != found.device:
            self.flags[layer.name] = found
        else:
            flag.logical_or_(found)

    def read_outside(self, layer: RoutedLayer, routing: Routing) -> None:
        """Leave out what checkpointing computes again."""

    def end(self, output: object) -> None:
        """Keep the flags until they are read."""

    def forget(self) -> None:
        """Lower all flags."""
        for flag in self.flags.values():
            if flag is not None:
                flag.zero_()
