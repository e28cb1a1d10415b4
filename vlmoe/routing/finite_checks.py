# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Stops a training whose router logits are no longer finite, before they reach the weights.

    Trainer(..., callbacks=[StopOnNonFiniteRouting()])

or, in a loop of your own, between `backward` and the step:

    check_routing(model, step)
    optimizer.step()

Top-k chooses experts among NaN scores, too, without an error. Every sparse layer therefore keeps a
flag on its device (sparse_moe.py), which costs the forward pass no wait and no break in a compiled
graph; here all flags are read at once, once per optimizer step.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..modeling_vlmoe.sparse_moe import sparse_layers


def check_routing(model: nn.Module, step: int | None = None) -> None:
    """Raise if any router logit was not finite in training since the last call.

    In a process group all ranks must call it, and all raise if one has to.

    Args:
        model: VLMoE, or a wrapper around it.
        step: the number of the optimizer step that comes next, for the message.

    Raises:
        ValueError: naming the step and the first such layer.
    """
    layers = sparse_layers(model)
    if not layers:
        return
    flags = over_ranks([layer.non_finite for layer in layers.values()], model, [()] * len(layers))
    # One look at the device.
    bad = [name for name, flag in zip(layers, torch.stack(flags).tolist(), strict=True) if flag]
    if not bad:
        return
    for layer in layers.values():
        if layer.non_finite is not None:
            layer.non_finite.zero_()
    when = "" if step is None else f" in step {step}"
    raise ValueError(
        f"Router logits of {bad[0].removeprefix('module.')} are NaN or infinite{when} (in "
        f"{len(bad)} of {len(layers)} sparse layers; this is the first). The weights are still "
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

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """See `check_routing`; steps count from 1, as in checkpoint names."""
        check_routing(model, state.global_step + 1)
