# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Stops a training whose router logits are no longer finite, before they reach the weights.

    Trainer(..., callbacks=[StopOnNonFiniteRouting()])

or, in a loop of your own, between `backward` and the step:

    check_routing(model, step)
    optimizer.step()

Top-k chooses experts among NaN scores, too, without an error. Every sparse layer of a VLMoE
therefore keeps a flag on its device (sparse_moe.py), which costs the forward pass no wait and no
break in a compiled graph; `RoutingFlags` keeps those of other models. Here all flags are read at
once, once per optimizer step.
"""

import math

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..modeling_vlmoe.sparse_moe import sparse_layers
from .kinds import Inputs
from .record import Listener, Routing, has_experts
from .routed_layers import RoutedLayer


class RoutingFlags:
    """For each router of a model of transformers, whether its logits were not finite in training.

    A reader of the recorder; it listens until `remove`.

    Args:
        model: with sparse layers, or a wrapper around it.

    Raises:
        ValueError: the model has no sparse layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._listener = Listener(model, [self])
        self.flags: dict[str, torch.Tensor | None] = {
            layer.name: None for layer in self._listener.layers
        }

    def begin(self, backbone: PreTrainedModel, inputs: Inputs) -> bool:
        """Read the forward passes of training."""
        return backbone.training and torch.is_grad_enabled()

    @torch.no_grad()
    def read(self, layer: RoutedLayer, routing: Routing) -> None:
        """Set the layer's flag, on its device."""
        if routing.logits is not None:
            flag, found = self.flags[layer.name], ~routing.logits.isfinite().all()
            self.flags[layer.name] = found if flag is None else flag | found

    def read_outside(self, layer: RoutedLayer, routing: Routing) -> None:
        """Leave out what checkpointing computes again."""

    def end(self, output: object) -> None:
        """Keep the flags until they are read."""

    def forget(self) -> None:
        """Lower all flags."""
        self.flags = dict.fromkeys(self.flags)

    def remove(self) -> None:
        """Stop listening."""
        self._listener.remove()


def check_routing(
    model: nn.Module, step: int | None = None, flags: RoutingFlags | None = None
) -> None:
    """Raise if any router logit was not finite in training since the last call.

    In a process group all ranks must call it, and all raise if one has to.

    Args:
        model: VLMoE, or a wrapper around it; another model with its `flags`.
        step: the number of the optimizer step that comes next, for the message.

    Raises:
        ValueError: naming the step and the first such layer.
    """
    layers = sparse_layers(model)
    notes = flags.flags if flags else {name: each.non_finite for name, each in layers.items()}
    if not notes:
        return
    found = over_ranks(list(notes.values()), model, [()] * len(notes))
    # One look at the device.
    bad = [name for name, flag in zip(notes, torch.stack(found).tolist(), strict=True) if flag]
    if not bad:
        return
    if flags:
        flags.forget()
    for layer in layers.values():
        if layer.non_finite is not None:
            layer.non_finite.zero_()
    when = "" if step is None else f" in step {step}"
    raise ValueError(
        f"Router logits of {bad[0].removeprefix('module.')} are NaN or infinite{when} (in "
        f"{len(bad)} of {len(notes)} sparse layers; this is the first). The weights are still "
        "those before the step. Look for NaN in the pixel values or loaded weights; else try a "
        "smaller learning rate, gradient clipping, or bf16 in place of fp16."
    )


def over_ranks(
    notes: list[torch.Tensor | None], model: nn.Module, shapes: list[tuple[int, ...]]
) -> list[torch.Tensor]:
    """Return the sum over ranks of each sparse layer's note: int64, zeros for None.

    On the device of the first note, or where no layer has any of the model's first parameter.
    """
    device = next((n.device for n in notes if n is not None), next(model.parameters()).device)
    flat = [
        torch.zeros(math.prod(shape), dtype=torch.long, device=device)
        if note is None
        else note.to(device, torch.long).flatten()
        for note, shape in zip(notes, shapes, strict=True)
    ]
    total = torch.cat(flat)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    parts = total.split([len(each) for each in flat])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class StopOnNonFiniteRouting(TrainerCallback):
    """Ends the run before the optimizer step with an error where router logits were not finite."""

    def __init__(self) -> None:
        self._flags: RoutingFlags | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Listen to the routers of a model of transformers; a VLMoE's keep flags of their own."""
        if model is not None and not sparse_layers(model) and has_experts(model):
            self._flags = RoutingFlags(model)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """See `check_routing`; steps count from 1, as in checkpoint names."""
        check_routing(model, state.global_step + 1, self._flags)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Stop listening."""
        if self._flags is not None:
            self._flags.remove()
            self._flags = None
