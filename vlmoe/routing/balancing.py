# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Balancing without an auxiliary loss: the update of the routers' biases.

    config.text_config.router_bias_update_rate = 0.001  # before the model is made or loaded
    Trainer(..., callbacks=[RouterBiasCallback()])

or, in a loop of your own, on all ranks:

    optimizer.step()
    update_router_bias(model)

The rule is that of https://arxiv.org/abs/2408.15664 (algorithm 1) and DeepSeek-V3
(https://arxiv.org/abs/2412.19437, section 2.1.2): an expert with less than the mean load of its
layer becomes a little easier to choose, one with more a little harder,

    bias += rate * sign(mean load - load)

- The load is that of all training tokens of the optimizer step without padding: of all its
  micro-batches and all ranks. What gradient checkpointing computes again, evaluation and generation
  do not count.
- Loads are compared as integers, so that any split of the same tokens over ranks and micro-batches
  gives the same bias, bit for bit.
- The bias is in the state dict, and a checkpoint is taken after the update: a resumed run goes on
  with the same numbers. PEFT saves it with an adapter only if `modules_to_save` names the router:
  train other adapters without the callback.
- Experts of the vision tower and the connector have biases, too. Their load is that of the tiles,
  each as often as rows show it.
- The load balancing loss sees the scores without bias, as equation 18 of DeepSeek-V3 has it. To
  balance by the bias alone set `router_aux_loss_coef` to 0.
"""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..modeling_vlmoe.sparse_moe import sparse_layers
from .finite_checks import over_ranks


@torch.no_grad()
def update_router_bias(model: nn.Module) -> None:
    """Update all biases from the load since the last call, and count anew.

    In a process group all ranks must call it.

    Args:
        model: VLMoE, or a wrapper around it.

    Raises:
        ValueError: the model has no router bias.
    """
    layers = _layers_with_bias(model)
    shapes = [tuple(_bias(layer).shape) for layer in layers]  # tower and decoder may differ
    loads = over_ranks([layer.expert_load for layer in layers], model, shapes)
    for layer, load in zip(layers, loads, strict=True):
        bias, direction = _bias(layer), (load.sum() - load * len(load)).sign()  # (experts,) each
        bias.add_(direction.to(bias), alpha=layer.router_bias_update_rate)
    forget_load(model)


def forget_load(model: nn.Module) -> None:
    """Count anew, without an update.

    Raises:
        ValueError: the model has no router bias.
    """
    for layer in _layers_with_bias(model):
        if layer.expert_load is not None:
            layer.expert_load.zero_()


class RouterBiasCallback(TrainerCallback):
    """Updates the biases after each optimizer step of `Trainer`.

    Raises:
        ValueError: when training begins, if the model has no router bias.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Forget what was counted before: the biases move by this training only."""
        forget_load(model)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """See `update_router_bias`."""
        update_router_bias(model)


def _layers_with_bias(model: nn.Module) -> list[Any]:
    layers = [layer for layer in sparse_layers(model).values() if layer.router_bias_update_rate]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no router bias: set `router_bias_update_rate` of its text "
            "config to more than 0 (DeepSeek-V3: 0.001) before the model is made or loaded."
        )
    return layers


def _bias(layer: nn.Module) -> torch.Tensor:
    """(experts,), also of a router that PEFT wraps; where it trains a copy of it, the copy's."""
    biases = [b for name, b in layer.named_buffers() if name.endswith("e_score_correction_bias")]
    return biases[-1]
