# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Warn where routers choose one expert with a weight that is always 1.

VLMoE's own router warns in its forward pass; this is for models of transformers, before training.
"""

from collections.abc import Iterable

from torch import nn
from transformers.utils import logging

from .routed_layers import RoutedLayer, routed_layers
from .scoring import weight_is_constant

logger = logging.get_logger(__name__)


def warn_of_constant_weights(model: nn.Module) -> bool:
    """Warn once if no gradient of the task reaches routers that train; return whether it is so.

    Asks each router with drawn tokens, without its own weights. A model whose routing cannot be
    read is left alone.
    """
    try:
        layers = [layer for layer in routed_layers(model) if _trains(layer)]
        constant = any(map(weight_is_constant, layers))
    except ValueError:
        return False
    if constant:
        logger.warning_once(
            f"The routers of {type(model).__name__} send each token to one expert (k = 1) and "
            "normalize its weight, which is then always 1: no gradient of the task reaches them, "
            f"only that of balancing losses. {_remedy(layers)}"
        )
    return constant


def _trains(layer: RoutedLayer) -> bool:
    return any(weight.requires_grad for weight in layer.router.parameters())


def _remedy(layers: Iterable[RoutedLayer]) -> str:
    if not all(weight_is_constant(layer, norm_topk_prob=False) for layer in layers):
        return (
            "Load the model with `norm_topk_prob=False` in its text config, which changes its "
            "function, or train with k = 2 or more."
        )
    return "Its class always normalizes: train with k = 2 or more."
