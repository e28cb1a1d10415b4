# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Balancing without an auxiliary loss: the update of the routers' biases.

    config.text_config.router_bias_update_rate = 0.001  # VLMoE: before the model is made or loaded
    Trainer(..., callbacks=[RouterBiasCallback()])

or, in a loop of your own, on all ranks:

    optimizer.step()
    update_router_bias(model)

and for transformers' own models

    Trainer(..., callbacks=[RouterBiasCallback(rate=0.001)])

    loads = SelectionLoads(model)  # before the first forward pass
    optimizer.step()
    update_router_bias(loads, rate=0.001)

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
- Of transformers' own models DeepSeek-V3, GLM-4V-MoE, MiniMax-M3-VL, LFM2-MoE and ERNIE-4.5-VL
  (each of its banks apart) have such a bias; nothing in transformers updates it. It must be fp32,
  since bf16 numbers near 1 are 0.008 apart: where it was loaded with another dtype it is widened.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .finite_checks import over_ranks
from .routed_layers import is_vlmoe
from .selection_loads import SelectionLoads
from .watch import has_been_read, unwatch_routing, watch_of, watch_routing

DEFAULT_RATE = 0.001
"""Of transformers' own models; DeepSeek-V3's."""


@torch.no_grad()
def update_router_bias(model: nn.Module | SelectionLoads, rate: float | None = None) -> None:
    """Update all biases from the load since the last call, and count from zero.

    In a process group all ranks must call it.

    Args:
        model: VLMoE, or a wrapper around it; or the loads of one of transformers' own models.
        rate: how far a bias moves; `DEFAULT_RATE` by default. A VLMoE's is in its config.

    Raises:
        ValueError: the model has no router bias, or a rate is given for a VLMoE.
    """
    if rate is not None and not isinstance(model, SelectionLoads):
        raise ValueError(
            f"rate is {rate}, but a VLMoE's is in its text config: set `router_bias_update_rate`. "
            "Of transformers' own models give the `SelectionLoads`."
        )
    counted = _loads(model)
    if rate is None:
        rate = DEFAULT_RATE if counted.rate is None else counted.rate
    biases = counted.biases()
    # those of tower and decoder may differ
    shapes: list[tuple[int, ...]] = [(bias.numel(),) for bias in biases]
    totals = over_ranks(counted.loads, counted.layers[0].router, shapes)
    for bias, load in zip(biases, totals, strict=True):
        direction = (load.sum() - load * len(load)).sign().to(bias.device, bias.dtype)
        direction = direction.view(bias.shape)  # (experts,) or (1, experts)
        if isinstance(bias, DTensor):  # FSDP2 cuts ERNIE's, which is a parameter
            direction = distribute_tensor(direction, bias.device_mesh, bias.placements)
        bias.add_(direction, alpha=rate)
    forget_load(model)


def forget_load(model: nn.Module | SelectionLoads) -> None:
    """Count from zero, without an update.

    Raises:
        ValueError: the model has no router bias.
    """
    if not isinstance(model, SelectionLoads) and is_vlmoe(model):
        has_been_read(model)
    _loads(model).forget()


class RouterBiasCallback(TrainerCallback):
    """Updates the biases after each optimizer step of `Trainer`.

    Give it to the Trainer when that is made: biases of transformers' own models are made fp32
    before a checkpoint is loaded into them.

    Args:
        rate: for transformers' own models, see `update_router_bias`.

    Raises:
        ValueError: when training begins, or for transformers' own models already when the Trainer
            is made, if the model has no router bias.
    """

    def __init__(self, rate: float | None = None):
        self.rate = rate
        self._loads: SelectionLoads | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Listen to transformers' own models."""
        if model is not None and not is_vlmoe(model):
            self._listen(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """Forget what was counted before: the biases move by this training only."""
        if not is_vlmoe(model) and self._loads is None and self._listen(model):
            if state.global_step:
                raise ValueError(
                    "The biases were loaded from the checkpoint in a lower precision than fp32: "
                    "give RouterBiasCallback to the Trainer when it is made."
                )
        if is_vlmoe(model):
            watch_routing(model)
        forget_load(self._counted(model))

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """See `update_router_bias`."""
        update_router_bias(self._counted(model), self.rate)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Stop listening."""
        if self._loads is not None:
            self._loads.remove()
            self._loads = None
        elif model is not None:
            unwatch_routing(model)

    def _counted(self, model: nn.Module) -> nn.Module | SelectionLoads:
        return model if self._loads is None else self._loads

    def _listen(self, model: nn.Module) -> bool:
        """Return whether biases were made fp32."""
        self._loads = SelectionLoads(model)
        return self._loads.widen()


def _loads(model: nn.Module | SelectionLoads) -> SelectionLoads:
    if isinstance(model, SelectionLoads):
        return model
    loads = watch_of(model).loads if is_vlmoe(model) else None
    if loads is None or not loads.rate:
        raise ValueError(
            f"{type(model).__name__} has no router bias: set `router_bias_update_rate` of its text "
            "config to more than 0 (DeepSeek-V3: 0.001) before the model is made or loaded. Of "
            "transformers' own models count the loads first: `SelectionLoads(model)`."
        )
    return loads
