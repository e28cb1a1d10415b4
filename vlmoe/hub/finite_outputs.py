# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Refuse NaN or infinite logits, with an error that names the layer where they began.

Evaluation, inspection and generation use it. Weights are checked when they are loaded
(`require_finite`); this finds activations that overflow.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessor, LogitsProcessorList


def require_finite_logits(
    logits: torch.Tensor, model: nn.Module, inputs: Mapping[str, torch.Tensor]
) -> None:
    """Raise unless each row's largest logit is a finite number.

    Args:
        logits: (..., vocabulary); -inf masks a token.
        model, inputs: run once more, after a failure, to find the layer.

    Raises:
        ValueError: naming the first module whose output is not finite.
    """
    if logits.amax(-1).isfinite().all():
        return
    name = first_non_finite_module(model, inputs)
    where = f"the first are those of {name}" if name else "they begin after the prompt"
    raise ValueError(
        f"The model's outputs are NaN or infinite: {where}. Its weights are finite, but too large "
        "for this dtype: try --dtype float32, or an older checkpoint."
    )


def finite_logits(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> LogitsProcessorList:
    """Return a `logits_processor` with which `generate` raises as `require_finite_logits` does."""
    return LogitsProcessorList([_FiniteLogits(model, inputs)])


@torch.no_grad()
def first_non_finite_module(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first module whose output is NaN or infinite, if any."""
    found: list[str] = []

    def look_at(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: object, output: object) -> None:
            floats = (
                t for t in tree_leaves(output) if torch.is_tensor(t) and t.is_floating_point()
            )
            if not found and not all(t.isfinite().all() for t in floats):
                found.append(name)

        return look

    handles = [m.register_forward_hook(look_at(name)) for name, m in model.named_modules() if name]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


class _FiniteLogits(LogitsProcessor):
    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
        self.model, self.inputs = model, inputs

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(batch, vocabulary), as it is."""
        require_finite_logits(scores, self.model, self.inputs)
        return scores
