# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Outputs of VLMoE's backbone, with router logits, for a loss that is computed outside of it.

Logits are those that the decoder layers return: they have a graph under re-entrant checkpointing,
too, where those that a router returns inside of a layer have none.
"""

from typing import cast

from transformers import PreTrainedModel

from ..modeling_vlmoe.model_outputs import VLMoEModelOutputWithPast
from ..modeling_vlmoe.modeling_vlmoe import VLMoEModel
from ..routing.kinds import Inputs
from ..routing.record import Listener, Routing
from ..routing.routed_layers import RoutedLayer


class BackboneOutputs:
    """Keeps the output of every call of the backbone, in order; a `Reader`, until `remove`."""

    def __init__(self, backbone: VLMoEModel):
        self.outputs: list[VLMoEModelOutputWithPast] = []
        self._listener = Listener(backbone, [self], layers=[])

    def wants(self, backbone: PreTrainedModel, inputs: Inputs) -> dict[str, object]:
        """Ask for the router logits."""
        return {"output_router_logits": True}

    def begin(self, backbone: PreTrainedModel, inputs: Inputs) -> bool:
        """Read every forward pass."""
        return True

    def read(self, layer: RoutedLayer, routing: Routing) -> None:
        """Pass over the banks."""

    def read_outside(self, layer: RoutedLayer, routing: Routing) -> None:
        """Pass over the banks."""

    def end(self, output: object) -> None:
        """Keep the output."""
        self.outputs.append(cast(VLMoEModelOutputWithPast, output))

    def remove(self) -> None:
        """Stop listening."""
        self._listener.remove()
