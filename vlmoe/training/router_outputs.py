# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Router logits of the last forward pass of a sparse model, with their graph.

Hooks listen to the routers and to the backbone, the module that gets the attention mask; whatever
wraps the model (PEFT, DistributedDataParallel) calls both. Gradient checkpointing calls routers
again in the backward pass: what comes outside of a forward pass of the backbone is left out.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_vlmoe.modeling_vlmoe_text import real_tokens
from ..routing.routed_layers import RoutedLayer
from ..routing.scoring import router_logits_of

NOT_SEEN = (
    "No router of {name} was seen in this forward pass. Make the loss from the model that is "
    "trained, before it is compiled or wrapped, and call it once after each forward pass."
)


@dataclass
class ForwardPass:
    """One forward pass.

    Attributes:
        logits: (tokens, experts) as each router returned them, by the layer's name.
        attention_mask: as the backbone got it.
        is_vision: (batch, length), True where ERNIE sends a token to the bank for images.
    """

    logits: dict[str, torch.Tensor] = field(default_factory=dict)
    attention_mask: Any = None
    is_vision: torch.Tensor | None = None

    def real_tokens(self, labels: torch.Tensor) -> torch.Tensor:
        """(batch, length): True for real tokens, not padding."""
        return real_tokens(self.attention_mask, labels).to(labels.device)

    def members(self, layer: RoutedLayer, labels: torch.Tensor) -> torch.Tensor:
        """(batch, length): True for tokens that the layer's bank sees."""
        if self.is_vision is None or not _has_sibling(layer):
            return torch.ones_like(labels, dtype=torch.bool)
        is_vision = self.is_vision.to(labels.device)
        return is_vision if layer.place == "vision" else ~is_vision

    def logits_of(self, layer: RoutedLayer, members: torch.Tensor) -> torch.Tensor | None:
        """(batch * length, experts), zeros for tokens of the other bank; None if all are.

        Raises:
            RuntimeError: the layer's router was not called with these tokens.
        """
        logits = self.logits.get(layer.name)
        if logits is None and layer.place == "vision" and self.is_vision is None:
            return None
        seen = 0 if logits is None else len(logits)
        if logits is not None and seen == members.numel():
            return logits
        if logits is None or seen != members.sum():
            raise RuntimeError(
                f"The router of {layer.name} saw {seen} tokens; the labels are for "
                f"{tuple(members.shape)}, of which {int(members.sum())} are its own."
            )
        everything = logits.new_zeros(members.numel(), logits.shape[-1])
        return everything.index_put((members.flatten().to(logits.device).nonzero()[:, 0],), logits)


class RouterOutputs:
    """Listens to a model from its construction on, and keeps the last forward pass."""

    def __init__(self, head: PreTrainedModel, layers: list[RoutedLayer]):
        self._head = head
        self._running = False
        self._current = ForwardPass()
        self._last: ForwardPass | None = None
        backbone = head.base_model
        self._signature = inspect.signature(backbone.forward)
        self._handles = [
            backbone.register_forward_pre_hook(self._begin, with_kwargs=True),
            backbone.register_forward_hook(self._end),
            *(layer.router.register_forward_hook(self._keep(layer)) for layer in layers),
        ]

    def take(self) -> ForwardPass:
        """Return the last forward pass and forget it.

        Raises:
            RuntimeError: there was none since the last call, or its routers were not called.
        """
        last, self._last = self._last, None
        if last is None or not last.logits:
            raise RuntimeError(NOT_SEEN.format(name=type(self._head).__name__))
        return last

    def remove(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = given | given.get("kwargs", {})
        types = given.get("moe_mm_token_type_ids")
        is_vision = types.bool() if types is not None and types.any() else None
        self._current = ForwardPass(attention_mask=given.get("attention_mask"), is_vision=is_vision)
        self._running, self._last = True, None

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running, self._last = False, self._current
        self._current = ForwardPass()

    def _keep(self, layer: RoutedLayer) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            logits = router_logits_of(output, layer.num_experts)
            if self._running and logits is not None:
                self._current.logits[layer.name] = logits

        return hook


def _has_sibling(layer: RoutedLayer) -> bool:
    return layer.place == "vision" or ".text_moe." in layer.name
