# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Healing: a few steps of distillation from the model as it was before its compression.

The router, too, has to learn what its experts have become (Router KD,
https://arxiv.org/abs/2603.02217). Decoder experts and routers are trained; everything else stays.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.answers import evaluation_mode
from ..routing.routed_layers import RoutedLayer
from .calibration import Batch, answer_positions, model_inputs

Tensor = torch.Tensor
RATE, BETAS, LARGEST_NORM, WARMUP = 2e-3, (0.9, 0.98), 1.0, 0.1


@torch.no_grad()
def teacher_logits(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """Return a model's logits where answers are predicted, (T, vocabulary) for each batch."""
    with evaluation_mode(model):
        return [
            model(**model_inputs(model, batch), use_cache=False)
            .logits[answer_positions(batch).to(model.device)]
            .cpu()
            for batch in batches
        ]


def heal(
    model: PreTrainedModel,
    layers: Sequence[RoutedLayer],
    batches: Sequence[Batch],
    teacher: Sequence[Tensor],
    steps: int,
    *,
    rate: float = RATE,
    seed: int = 0,
) -> list[float]:
    """Train experts and routers towards the teacher's distribution at the tokens of answers.

    One step takes one batch; batches come in a random order, epoch after epoch. The loss is the
    KL divergence from the teacher, in the mean over answer tokens; AdamW, gradients clipped to norm
    1, one-cycle rate.

    Returns:
        The loss of each step.
    """
    trained = [
        parameter
        for layer in layers
        for module in (layer.experts, layer.router)
        for parameter in module.parameters()
    ]
    learning = {id(each) for each in model.parameters() if each.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses = []
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is each for each in trained))
        optimizer = torch.optim.AdamW(trained, lr=rate, betas=BETAS, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps + 1, pct_start=WARMUP)
        with evaluation_mode(model), torch.enable_grad():
            for _ in logging.tqdm(range(steps), desc="healing", unit="step"):
                order = order or torch.randperm(len(batches), generator=generator).tolist()
                number = order.pop()
                losses.append(_step(model, batches[number], teacher[number], trained, optimizer))
                schedule.step()
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in learning)
            parameter.grad = None
    return losses


def _step(
    model: PreTrainedModel,
    batch: Batch,
    teacher: Tensor,
    trained: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> float:
    logits = model(**model_inputs(model, batch), use_cache=False).logits
    logits = logits[answer_positions(batch).to(model.device)].float()
    wanted = teacher.to(logits.device).float().log_softmax(-1)
    loss = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())
