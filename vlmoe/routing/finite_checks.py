# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Stops a training whose router logits are no longer finite, before they reach the weights.

    Trainer(..., callbacks=[StopOnNonFiniteRouting()])

or, in a loop of your own, between `backward` and the step:

    check_routing(model, step)
    optimizer.step()

The flags of all routers (finite_flags.py) are read at once, once per optimizer step. Those of a
VLMoE are raised in any loop (watch.py); for other models the callback listens.
"""

import math

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .finite_flags import RoutingFlags
from .record import Listener, find_backbone, has_experts
from .routed_layers import RoutedLayer, is_vlmoe, routed_layers
from .watch import has_been_read, unwatch_routing, watch_of, watch_routing


def check_routing(
    model: nn.Module, step: int | None = None, flags: RoutingFlags | None = None
) -> None:
    """Raise if any router logit was not finite in training since the last call.

    In a process group all ranks must call it, and all raise if one has to.

    Args:
        model: VLMoE, or a wrapper around it; another model with its `flags`.
        step: the number of the optimizer step that comes next, for the message.

    Raises:
        ValueError: naming the step and the first such layer; or passes of a VLMoE's training were
            not seen, see `watch_routing`.
    """
    if flags is None and is_vlmoe(model):
        watch = watch_of(model)
        flags = watch.flags
        if watch.loads is None:  # else `update_router_bias` comes, too
            has_been_read(model)
    if flags is None or not flags.layers:
        return
    found = over_ranks(list(flags.flags.values()), model, [()] * len(flags.layers))
    # One look at the device.
    bad = [i for i, flag in enumerate(torch.stack(found).tolist()) if flag]
    if not bad:
        return
    flags.forget()
    when = "" if step is None else f" in step {step}"
    raise ValueError(
        f"Router logits of {_name(flags.layers[bad[0]], model)} are NaN or infinite{when} (in "
        f"{len(bad)} of {len(flags.layers)} sparse layers; this is the first). The weights are "
        "still those before the step. Look for NaN in the pixel values or loaded weights; else try "
        "a smaller learning rate, gradient clipping, or bf16 in place of fp16."
    )


def _name(layer: RoutedLayer, model: nn.Module) -> str:
    """Return the name of a layer in the model: of a VLMoE its block's, of others its experts'."""
    if not is_vlmoe(model):
        return layer.name.removeprefix("module.")
    backbone = find_backbone(model)
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    return f"{prefix}.{layer.name}".removeprefix("module.").strip(".").removesuffix(".experts")


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
        self._listener: Listener | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Listen to the routers."""
        if model is None or not has_experts(model):
            return
        if is_vlmoe(model):
            watch_routing(model)
            return
        layers = routed_layers(model)
        self._flags = RoutingFlags(layers)
        self._listener = Listener(model, [self._flags], layers)

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
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Stop listening."""
        if self._listener is not None:
            self._listener.remove()
            self._flags = self._listener = None
        elif model is not None and is_vlmoe(model):
            unwatch_routing(model)
