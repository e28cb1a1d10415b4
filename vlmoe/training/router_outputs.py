# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Router logits of the last forward pass of a sparse model, with their graph."""

import torch
from transformers import PreTrainedModel

from ..routing.kinds import PADDING, token_kinds, vision_bank_tokens
from ..routing.record import Inputs, Listener, Routing
from ..routing.routed_layers import RoutedLayer

NOT_SEEN = (
    "No router of {name} was seen in this forward pass. Make the loss from the model that is "
    "trained, before it is compiled or wrapped, and call it once after each forward pass."
)


class RouterOutputs:
    """Listens to a model from its construction on; holds one forward pass at a time.

    Attributes:
        real: (batch, length), True for real tokens, not padding.
    """

    def __init__(self, head: PreTrainedModel, layers: list[RoutedLayer]):
        self.real = torch.ones(0, 0, dtype=torch.bool)
        self._head = head
        self._logits: dict[str, torch.Tensor] = {}
        self._is_vision: torch.Tensor | None = None
        self._is_whole = False
        self._listener = Listener(head, [self], layers)

    def take(self) -> dict[str, torch.Tensor]:
        """Return the logits (tokens, experts) by the layer's name, and forget them.

        Raises:
            RuntimeError: there was no forward pass since the last call, or it called no router.
        """
        logits, self._logits = self._logits, {}
        if not (self._is_whole and logits):
            raise RuntimeError(NOT_SEEN.format(name=type(self._head).__name__))
        return logits

    def members(self, layer: RoutedLayer) -> torch.Tensor:
        """(batch, length): True for tokens that the layer's bank sees, padding included."""
        if self._is_vision is None or not layer.is_one_of_two:
            return torch.ones_like(self.real)
        is_vision = self._is_vision.to(self.real.device)
        return is_vision if layer.place == "vision" else ~is_vision

    def spread(
        self, layer: RoutedLayer, logits: torch.Tensor | None, members: torch.Tensor
    ) -> torch.Tensor | None:
        """(tokens, experts) -> (batch * length, experts), zeros for tokens of the other bank.

        None where the bank got no tokens, since there are no images.

        Raises:
            RuntimeError: the layer's router was not called with the tokens of the batch.
        """
        if logits is None and layer.place == "vision" and self._is_vision is None:
            return None
        seen = 0 if logits is None else len(logits)
        if logits is not None and seen == members.numel():
            return logits
        if logits is None or seen != members.sum():
            raise RuntimeError(
                f"The router of {layer.name} saw {seen} tokens of a batch of "
                f"{tuple(members.shape)}, of which {int(members.sum())} are its own."
            )
        everything = logits.new_zeros(members.numel(), logits.shape[-1])
        return everything.index_put((members.flatten().to(logits.device).nonzero()[:, 0],), logits)

    def remove(self) -> None:
        """Stop listening."""
        self._listener.remove()

    def begin(self, backbone: PreTrainedModel, inputs: Inputs) -> bool:
        """Forget the pass before."""
        self._logits, self._is_whole = {}, False
        self.real = token_kinds(inputs, backbone.config) != PADDING
        self._is_vision = vision_bank_tokens(inputs)
        return True

    def read(self, layer: RoutedLayer, routing: Routing) -> None:
        """Keep the logits."""
        if routing.logits is not None:
            self._logits[layer.name] = routing.logits

    def read_outside(self, layer: RoutedLayer, routing: Routing) -> None:
        """Leave out what checkpointing computes again."""

    def end(self, output: object) -> None:
        """Mark the pass as whole."""
        self._is_whole = True
