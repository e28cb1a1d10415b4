# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The neurons of experts, in the layout that most families have under transformers' interface.

A neuron of an expert is one row of its gate, the same row of its up projection, and one column of
its down projection. A bank holds them as `gate_up_proj` (E, 2 I, H), gate first, and `down_proj`
(E, H, I), without biases.

Shapes: E experts, I neurons of an expert, H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .routed_layers import routed_layers

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "is_concatenated": True,
    "is_transposed": False,
    "_is_expert_parallel": False,
}
"""What transformers' experts interface says of a bank in this layout."""


@dataclass(frozen=True)
class NeuronBank:
    """The weights of the experts of one layer.

    Attributes:
        name: path of the bank in the model.
        gate_up: (E, 2 I, H), gate first.
        down: (E, H, I).
    """

    name: str
    gate_up: nn.Parameter
    down: nn.Parameter

    @property
    def width(self) -> int:
        """Neurons of an expert."""
        return self.down.shape[2]

    @property
    def gate_and_up(self) -> torch.Tensor:
        """Return (E, 2, I, H), a view."""
        return self.gate_up.unflatten(1, (2, self.width))

    def norms(self) -> torch.Tensor:
        """Return (E, I), the L2 norm of each neuron, in fp32."""
        with torch.no_grad():
            rows = torch.linalg.vector_norm(self.gate_up, dim=2, dtype=torch.float32)
            columns = torch.linalg.vector_norm(self.down, dim=1, dtype=torch.float32)
            gate, up = rows.chunk(2, dim=1)
            return torch.stack([gate, up, columns]).norm(dim=0)

    def alive(self) -> torch.Tensor:
        """Return (E, I), True for neurons with a weight that is not zero."""
        rows = (self.gate_and_up != 0).any(dim=3).any(dim=1)
        return rows | (self.down != 0).any(dim=1)


def neuron_banks(model: nn.Module) -> tuple[list[NeuronBank], list[str]]:
    """Return the banks in the layout of this module, and the names of all others.

    Others have biases, no gate, or another order of their weights, are quantized, cut over ranks,
    or wrapped by PEFT.

    Raises:
        ValueError: the model has no experts.
    """
    banks, others = [], []
    for layer in routed_layers(model):
        found = dict(layer.experts.named_parameters())
        plain = all(getattr(layer.experts, key, None) == value for key, value in _LAYOUT.items())
        plain = plain and found.keys() == {GATE_UP, DOWN}
        if plain and all(_is_dense(weight) for weight in found.values()):
            banks.append(NeuronBank(layer.name, found[GATE_UP], found[DOWN]))
        else:
            others.append(layer.name)
    return banks, others


def _is_dense(weight: nn.Parameter) -> bool:
    """Return whether it is no DTensor and no tensor of numbers and scales."""
    plain = not hasattr(weight, "__tensor_flatten__")
    return plain and weight.is_floating_point() and weight.dim() == 3
