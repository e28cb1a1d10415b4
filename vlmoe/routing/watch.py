# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Readers that listen to a VLMoE for as long as it trains, in any loop.

`check_routing(model)` and `update_router_bias(model)` read, once per optimizer step, notes about
the forward passes before. So the readers must be there before either is called: the callbacks of
`Trainer` place them, or else the model's first forward pass of training (modeling_vlmoe.py).

Hooks that are placed on a model that was compiled and called already are not called. A step of
training that nobody saw is an error, since a bias would never move.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .finite_flags import RoutingFlags
from .record import Listener, Reader, find_backbone, has_experts
from .routed_layers import RoutedLayer, routed_layers, selection_bias
from .selection_loads import SelectionLoads


class _HeardFlags(RoutingFlags):
    """Tells the backbone that a forward pass of training was heard."""

    def __init__(self, backbone: nn.Module, layers: list[RoutedLayer]) -> None:
        super().__init__(layers)
        self._backbone: Any = backbone

    def end(self, output: object) -> None:
        """See the class."""
        self._backbone.is_unheard = False


class TrainingWatch:
    """The notes about the forward passes of a VLMoE's training.

    Args:
        backbone: of the model.

    Attributes:
        flags: of router logits that were not finite.
        loads: of its experts; None of a model without router bias.
    """

    def __init__(self, backbone: nn.Module) -> None:
        layers = routed_layers(backbone) if has_experts(backbone) else []
        has_bias = any(selection_bias(layer) is not None for layer in layers)
        self.flags = _HeardFlags(backbone, layers)
        self.loads = SelectionLoads(backbone, listen=False) if has_bias else None
        readers: list[Reader] = [self.flags]
        if self.loads is not None:
            readers.append(self.loads)
        self._listener = Listener(backbone, readers, layers)

    def begin(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Begin a forward pass that had begun already when this was made."""
        self._listener.begin(args, dict(kwargs))

    def remove(self) -> None:
        """Stop listening."""
        self._listener.remove()


def watch_routing(model: nn.Module) -> TrainingWatch:
    """Listen to a VLMoE that trains, from now on; notes so far are forgotten.

    A loop of your own needs it only for a model that is compiled before it is first called in
    training, or whose code was loaded from the Hub.

    Args:
        model: a VLMoE, or a wrapper around it.
    """
    unwatch_routing(model)
    backbone: Any = find_backbone(model)
    backbone.routing_watch = TrainingWatch(backbone)
    return backbone.routing_watch


def watch_of(model: nn.Module) -> TrainingWatch:
    """Return the watch of a VLMoE, which begins now if there was none.

    Raises:
        ValueError: the last forward pass of training was not seen.
    """
    backbone: Any = find_backbone(model)
    watch = getattr(backbone, "routing_watch", None) or watch_routing(model)
    if backbone.is_unheard and watch.flags.layers:
        raise ValueError(
            "The routing of the forward passes of training was not seen, since the model was "
            "compiled before, or its code was loaded from the Hub. Call "
            "vlmoe.routing.watch_routing(model) before the first step and before torch.compile."
        )
    return watch


def unwatch_routing(model: nn.Module) -> None:
    """Stop listening to a VLMoE, until its next forward pass of training."""
    backbone: Any = find_backbone(model)
    if (watch := getattr(backbone, "routing_watch", None)) is not None:
        watch.remove()
        backbone.routing_watch = None


def has_been_read(model: nn.Module) -> None:
    """Note that what a VLMoE has learned since the last call is accounted for."""
    backbone: Any = find_backbone(model)
    backbone.has_learned = backbone.is_unheard = False
