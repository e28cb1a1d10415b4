# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""L1 sparsity with true zeros: whole neurons of experts become zero while they are trained.

An L1 term in the loss brings weights close to zero, where Adam's steps make them jump about it. The
proximal step of the group lasso (Yuan and Lin 2006; Parikh and Boyd, Proximal Algorithms, 6.5.1)
sets them to zero: after each step of the optimizer, every group g becomes

    g * max(0, 1 - learning_rate * strength / |g|)

A group is one neuron of one expert: its row of the gate, its row of the up projection, its column
of the down projection. A neuron of zeros adds nothing to the output and gets no gradient;
`vlmoe prune` cuts it off. Routers, shared experts, attention, norms and embeddings stay as they
are.

    VLMoETrainer(..., callbacks=[GroupLasso(share=1.2)])
"""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..routing.neuron_banks import NeuronBank, neuron_banks

logger = logging.get_logger(__name__)

HALF_STEPS = 64
"""Proximal steps of a run for weights in half precision, whose rounding swallows smaller ones."""


class GroupLasso(TrainerCallback, ExportableState):
    """Shrinks the neurons of experts after each optimizer step, and those that are small to zero.

    Over a run every neuron loses `strength` times the sum of the learning rates of its norm, less
    what its gradient gives back. `share` says this length in the unit of the median norm at the
    start: below about 0.6 nothing becomes zero, from 1 on only what the task holds on to is left.

    Weights in half precision are shrunk in 64 steps of a run, each for the optimizer steps since
    the one before, at the present learning rate.

    One process or DistributedDataParallel, where each rank takes the same step; not FSDP, DeepSpeed
    or expert parallelism, where a rank holds parts of neurons. Experts that are frozen, adapted by
    PEFT, or laid out in another way (`neuron_banks.py`) are left as they are.

    Args:
        strength: of the formula; or
        share: the length, over the whole run, in median norms of the neurons at the start.

    Raises:
        ValueError: not one of the two is given, or it is not finite or not above 0; as training
            begins: no expert can be shrunk, ranks hold parts of neurons, or for a `share` the sum
            of the learning rates is not known ahead.
    """

    def __init__(self, strength: float | None = None, *, share: float | None = None) -> None:
        given = {"strength": strength, "share": share}
        values = {name: value for name, value in given.items() if value is not None}
        if len(values) != 1:
            raise ValueError("GroupLasso takes one of `strength` and `share`.")
        for name, value in values.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` is {value}; allowed: finite numbers above 0.")
        self.strength, self.share = strength, share
        self._banks: list[NeuronBank] = []
        self._half_every = 1

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: a resumed run goes on with the strength of its start."""
        return {"args": {"strength": self.strength, "share": None}, "attributes": {}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Find the neurons, and the strength for a `share`."""
        _require_whole_neurons(args)
        self._banks = _trained_banks(kwargs["model"])
        self._half_every = max(1, state.max_steps // HALF_STEPS)
        kept = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if isinstance(kept, dict) and self.share is not None:
            self.strength = kept["args"]["strength"]
        elif self.share is not None:
            rates = _sum_of_rates(kwargs["lr_scheduler"], state.max_steps)
            norms = torch.cat([bank.norms().flatten() for bank in self._banks])
            self.strength = self.share * float(norms.median()) / rates

    @torch.no_grad()
    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the proximal step, with the learning rate of the optimizer's."""
        optimizer = kwargs["optimizer"]
        if getattr(optimizer, "step_was_skipped", False):
            return
        assert self.strength is not None
        rates = {id(w): float(g["lr"]) for g in optimizer.param_groups for w in g["params"]}
        for bank in self._banks:
            steps = self._half_every if bank.down.dtype.itemsize < 4 else 1
            if (state.global_step + 1) % steps == 0:
                shrink(bank, steps * rates[id(bank.down)] * self.strength)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Log how many neurons are zero."""
        zero = sum(int((~bank.alive()).sum()) for bank in self._banks)
        total = sum(bank.down.shape[0] * bank.width for bank in self._banks)
        if state.is_world_process_zero:
            logger.warning(
                f"{zero:,} of {total:,} neurons of experts are zero ({zero / total:.1%}); "
                "`vlmoe prune` cuts them off."
            )


@torch.no_grad()
def shrink(bank: NeuronBank, length: float) -> None:
    """Take `length` off the norm of each neuron, in place; neurons that are shorter become zero."""
    if length <= 0:  # as at the end of a schedule
        return
    factor = (1 - length / bank.norms()).clamp(min=0)  # (E, I)
    bank.gate_and_up.mul_(factor[:, None, :, None])
    bank.down.mul_(factor[:, None, :])


def _trained_banks(model: torch.nn.Module) -> list[NeuronBank]:
    """Return the banks that are trained; warn of others.

    Raises:
        ValueError: there are none.
    """
    banks, others = neuron_banks(model)
    trained = [bank for bank in banks if bank.down.requires_grad and bank.gate_up.requires_grad]
    left_out = [*others, *(bank.name for bank in banks if bank not in trained)]
    shown = ", ".join(left_out[:4]) + (", ..." if len(left_out) > 4 else "")
    if not trained:
        raise ValueError(
            f"GroupLasso finds no experts to shrink: {shown} are frozen, adapted by PEFT, "
            "quantized, cut over ranks, or have biases or another layout than gate_up_proj "
            "(E, 2 I, H) and down_proj (E, H, I). Train the experts themselves, or leave it out."
        )
    if left_out:
        logger.warning(f"GroupLasso leaves these experts as they are: {shown}.")
    return trained


def _require_whole_neurons(args: TrainingArguments) -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    kind = PartialState().distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"GroupLasso does not work under {kind.value}: a rank holds parts of neurons, whose "
            "norms would need an all-reduce. Use DistributedDataParallel, or leave it out."
        )


def _sum_of_rates(scheduler: Any, steps: int) -> float:
    """Return the sum of the learning rates of a run, of the first group of parameters.

    Raises:
        ValueError: the rates depend on the run.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # in accelerate's wrapper
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"The learning rates of {type(scheduler).__name__} are not known ahead, as `share` "
            "needs it: give GroupLasso a `strength`."
        )
    rate, factor = scheduler.base_lrs[0], scheduler.lr_lambdas[0]
    total = float(sum(rate * factor(step) for step in range(steps)))
    if total <= 0:
        raise ValueError(
            f"The learning rates of the run sum up to {total}: GroupLasso shrinks with them."
        )
    return total
