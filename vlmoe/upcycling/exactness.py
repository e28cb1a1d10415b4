# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Compare the logits of the dense and the sparse model.

The error is max|sparse - dense| / max|dense| over all real tokens: a deep model's logits differ by
rounding that grows with their size. Weights in half precision are widened to fp32 one at a time,
where they are multiplied, so that memory never holds the model twice.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..configuration.configuration_vlmoe_text import MODEL_TYPE

Tensor = torch.Tensor
TOLERANCE = 1e-5
HALF = (torch.float16, torch.bfloat16)
PRODUCTS = (
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.layer_norm,
    F.rms_norm,
    F.group_norm,
    F.multi_head_attention_forward,
    torch.matmul,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
)


class UpcyclingError(ValueError):
    """The sparse model does not compute the function of the dense one."""


@dataclass(frozen=True)
class Outputs:
    """A model's outputs on the sample: logits (tokens, vocabulary) of the real tokens in fp32."""

    logits: Tensor
    loss: float

    def error(self, reference: "Outputs") -> float:
        """Return max|d| / max|reference|, over the reference's vocabulary."""
        shared = self.logits[:, : reference.logits.shape[1]]
        difference = (shared - reference.logits).abs().max()
        return float(difference / reference.logits.abs().max())

    def same_argmax(self, reference: "Outputs") -> float:
        """Return the share of tokens with the same most likely next token."""
        shared = self.logits[:, : reference.logits.shape[1]]
        return float((shared.argmax(-1) == reference.logits.argmax(-1)).float().mean())


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Tensor], in_fp32: bool) -> Outputs:
    """Run a dense or sparse model over a sample.

    Args:
        model: in evaluation mode.
        inputs: the sample as the model's class takes it.
        in_fp32: compute with the weights in fp32, whatever they are stored in.

    Raises:
        UpcyclingError: in fp32 a logit is NaN or infinite.
    """
    placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with ComputingInFp32() if in_fp32 else nullcontext():
        logits = model(**placed, use_cache=False).logits
    logits, real = logits.float().cpu(), inputs["attention_mask"].bool()
    if in_fp32 and not logits[real].isfinite().all():
        raise UpcyclingError(
            f"The logits of {type(model).__name__} are NaN or infinite; its weights are finite, "
            "but too large. Start from another checkpoint."
        )
    labels = inputs["input_ids"].masked_fill(~real, -100)
    for name in ("image_token_id", "video_token_id"):
        if getattr(model.config, name, None) is not None:
            labels = labels.masked_fill(labels == getattr(model.config, name), -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return Outputs(logits[real], float(loss))


@contextmanager
def experts_computed_by(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Choose the implementation of the experts, also of a language model inside a container."""
    owners = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module._can_set_experts_implementation()
    ]
    before = [owner.config._experts_implementation for owner in owners]
    for owner in owners:
        owner.set_experts_implementation(implementation)
    try:
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            owner.set_experts_implementation(own)


def inputs_for(model: PreTrainedModel, sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sample as the model's class takes it."""
    family = model.config.model_type
    inputs = {name: sample[name] for name in ("input_ids", "attention_mask")}
    if "pixel_values" not in sample:
        return inputs
    pixels, mask = sample["pixel_values"], sample["pixel_attention_mask"]
    if family in (MODEL_TYPE, "idefics3", "smolvlm"):
        return inputs | {"pixel_values": pixels, "pixel_attention_mask": mask}
    real = mask.flatten(0, 1).flatten(1).any(-1)
    return inputs | {"pixel_values": pixels.flatten(0, 1)[real]}


class ComputingInFp32(TorchFunctionMode):
    """While active, models with weights in half precision compute with them in fp32.

    A weight is widened where it is multiplied, one at a time, and of a bank of experts the one that
    `eager` takes; nothing is narrowed. What is elementwise widens by torch's type promotion.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Widen the factors of `func`, and its result where it would narrow."""
        widen = _wide_dtype if func is torch.Tensor.to else _wide_tensor
        if func is torch.Tensor.to or func in PRODUCTS:
            args = tuple(widen(value) for value in args)
            kwargs = {name: widen(value) for name, value in (kwargs or {}).items()}
        result = func(*args, **(kwargs or {}))
        return result.float() if func is F.embedding else result


def _wide_dtype(value: Any) -> Any:
    is_dtype = isinstance(value, torch.dtype)
    return torch.float32 if is_dtype and value in HALF else value


def _wide_tensor(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in HALF
    return value.float() if is_half else value
