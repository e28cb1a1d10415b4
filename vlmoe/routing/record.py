# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Listen to the routing of any sparse model of transformers; the one place that places hooks.

Under transformers' experts interface a bank is called with tokens, choice and weights, whatever
the family; its router is called just before. Hooks on both, and on the backbone, the module that
gets ids and attention mask, hand each forward pass to a `Reader`. They hear the same inside PEFT
and DistributedDataParallel, which may call the model's `forward` past its own hooks.

Gradient checkpointing, re-entrant or not, calls routers and banks again in the backward pass. That
is outside of the backbone's forward pass and is left out. Under expert parallelism a bank is called
with the choice among all experts; ranks that share a batch all see its tokens.

Under torch.compile the hooks that are there when the model is first traced become part of its one
graph; hooks placed on a model that is compiled already are not called, as with any hook.

Shapes: T tokens of a forward pass, or those that the bank gets; E experts; k experts per token.
"""

import copy
import inspect
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel

from .kinds import Inputs
from .routed_layers import RoutedLayer, routed_layers
from .scoring import router_logits_of


class Routing(NamedTuple):
    """The routing of one bank in one forward pass, with its graph.

    Attributes:
        chosen, weights: (T, k), as the bank was called with them.
        logits: (T, E), the first output of the router; None of a router without.
    """

    chosen: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor | None


class Reader(Protocol):
    """Reads the forward passes of a model."""

    def begin(self, backbone: PreTrainedModel, inputs: Inputs) -> bool:
        """Return whether to read this forward pass; `inputs` are its arguments by name."""
        ...

    def read(self, layer: RoutedLayer, routing: Routing) -> None:
        """Read one bank, in the order of the forward pass."""
        ...

    def end(self, output: object) -> None:
        """Finish the forward pass; `output` is the backbone's."""
        ...

    def read_outside(self, layer: RoutedLayer, routing: Routing) -> None:
        """Read a bank that was called outside of a forward pass.

        `generate` encodes images before it; checkpointing computes banks again.
        """
        ...


@runtime_checkable
class AskingReader(Reader, Protocol):
    """Asks the backbone for more outputs."""

    def wants(self, backbone: PreTrainedModel, inputs: Inputs) -> dict[str, object]:
        """Return arguments that are added to those of this forward pass."""
        ...


class Listener:
    """Hooks on a model that hand each forward pass to readers, until `remove` or a block's end.

    Args:
        model: any model with sparse layers of transformers, or a wrapper around it.
        readers: called in turn.
        layers: those to listen to; all of the model's by default.

    Raises:
        ValueError: the model has no sparse layers, or computes them in a way of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        readers: Iterable[Reader],
        layers: list[RoutedLayer] | None = None,
    ):
        self.layers = routed_layers(model) if layers is None else layers
        self._backbone = find_backbone(model)
        self._readers = tuple(readers)
        self._asking = [r for r in self._readers if isinstance(r, AskingReader)]
        self._reading: tuple[Reader, ...] = ()
        self._in_forward = False
        self._logits: dict[str, torch.Tensor | None] = {}
        self._names = tuple(inspect.signature(self._backbone.forward).parameters)
        self._handles = [
            self._backbone.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._backbone.register_forward_hook(self._end),
        ]
        for layer in self.layers:
            self._handles += [
                layer.router.register_forward_hook(partial(self._keep_logits, layer)),
                layer.experts.register_forward_pre_hook(partial(self._read, layer)),
            ]

    def remove(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        """Listen until the end of the block."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop listening."""
        self.remove()

    def begin(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        """Begin a forward pass of the backbone; return its arguments if readers change them.

        For a listener that is made while the backbone is called already.
        """
        inputs = dict(zip(self._names, args, strict=False)) | kwargs if args else kwargs
        self._in_forward = True
        self._logits = {}
        wanted = {k: v for r in self._asking for k, v in r.wants(self._backbone, inputs).items()}
        self._reading = tuple(r for r in self._readers if r.begin(self._backbone, inputs))
        return (args, kwargs | wanted) if wanted else None

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Copy it with its backbone; copies of other modules, as PEFT makes, are not heard."""
        if id(self._backbone) not in memo:
            return self
        memo[id(self)] = copied = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def _begin(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        return self.begin(args, kwargs)

    def _keep_logits(
        self, layer: RoutedLayer, router: nn.Module, args: tuple[object, ...], output: object
    ) -> None:
        if router is layer.router:
            self._logits[layer.name] = router_logits_of(output, layer.num_experts)

    def _read(self, layer: RoutedLayer, bank: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if bank is not layer.experts:
            return
        _, chosen, weights = args
        routing = Routing(chosen, weights, self._logits.pop(layer.name, None))
        if self._in_forward:
            for reader in self._reading:
                reader.read(layer, routing)
        else:
            for reader in self._readers:
                reader.read_outside(layer, routing)

    def _end(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        reading, self._reading = self._reading, ()
        self._in_forward = False
        for reader in reading:
            reader.end(output)


def find_backbone(model: nn.Module) -> PreTrainedModel:
    """Return the module that gets ids, attention mask and pixels: the model without its head.

    Raises:
        ValueError: there is no model of transformers.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module.base_model
    raise ValueError(f"{type(model).__name__} holds no model of transformers: it has no experts.")


def has_experts(model: nn.Module) -> bool:
    """Return whether the routing of a model can be recorded."""
    try:
        return bool(routed_layers(model))
    except ValueError:
        return False
