# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Train LoRA over int8 experts (QLoRA, https://arxiv.org/abs/2305.14314), one expert at a time.

A bank stays in int8 in both passes. The weights of one expert are made from its numbers and
scales where its matrix product needs them, into a buffer that the next expert overwrites, and made
again in the backward pass: no floating-point copy of a bank is made or saved.

Shapes: E experts, S rows sorted by expert, in and out the features of a projection.
"""

from typing import Any

import torch
from torch import nn
from transformers import TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from ..modeling_vlmoe.experts_auto import is_torchao
from ..modeling_vlmoe.quantization import EXPERT_PARAMETERS

try:
    from torchao.quantization import Int8Tensor
except ImportError:  # then no tensor is one
    Int8Tensor = ()

Tensor = torch.Tensor

CHUNK = 1 << 19  # numbers that are dequantized at once


def expert_int8_config() -> TorchAoConfig:
    """Make a config of int8 experts with a scale per row, everything else unchanged.

    A row of n bf16 weights, 2 n bytes, becomes n + 5 bytes. `save_pretrained` and `from_pretrained`
    keep the quantized weights. LoRA trains on them: `vlmoe.enable_routed_lora`. Needs torchao.
    """
    try:
        from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ImportError("Int8 experts need torchao: pip install torchao") from error
    return TorchAoConfig(FqnToConfig({EXPERT_PARAMETERS: Int8WeightOnlyConfig()}))


def is_int8(tensor: Tensor) -> bool:
    """Tell whether these are int8 weights with a scale per row, as `expert_int8_config` makes."""
    return (
        isinstance(tensor, Int8Tensor)
        and tensor.act_quant_kwargs is None
        and tensor.act_pre_scale is None
        and tensor.scale.shape == (*tensor.shape[:-1], 1)
    )


def stored(weight: Any) -> tuple[Tensor, Tensor | None]:
    """Return plain weights and None, or numbers (E, ., .) and scales (E, ., 1) of int8 ones."""
    return (weight.qdata, weight.scale) if is_int8(weight) else (weight, None)


def check_quantized_bank(name: str, bank: nn.Module) -> None:
    """Refuse a bank with torchao's tensors that the routed path cannot compute.

    Raises:
        ValueError: the weights are of another kind than `expert_int8_config` makes, or the bank
            alone could not be computed, as it must be where adapters are disabled.
    """
    quantized = {n: p for n, p in bank.named_parameters(recurse=False) if is_torchao(p)}
    for parameter_name, parameter in quantized.items():
        kind = type(parameter.data).__name__
        zero_point = None if parameter.is_meta else getattr(parameter, "zero_point", None)
        if not is_int8(parameter) or (zero_point is not None and zero_point.any()):
            raise ValueError(
                f"{name}: {parameter_name} is a {kind} of torchao; under LoRA allowed: int8 "
                "weights, symmetric, with a scale per row, and plain weights. Load the model with "
                "`quantization_config=vlmoe.expert_int8_config()`."
            )
    implementation = getattr(getattr(bank, "config", None), "_experts_implementation", None)
    if quantized and implementation not in (None, "eager", "auto"):
        raise ValueError(
            f"{name}: the experts are int8, and `experts_implementation` is {implementation!r}; "
            "allowed: 'eager', 'auto'. Call `model.set_experts_implementation('eager')`."
        )


class TrainableTorchAoHfQuantizer(TorchAoHfQuantizer):
    """The quantizer of a model whose int8 experts are trained through adapters.

    transformers' own finds int8 in the name of the config's class, and not within a `FqnToConfig`.
    """

    @property
    def is_trainable(self) -> bool:
        """Return True, so that `Trainer` accepts a quantized model with adapters."""
        return True


def let_trainer_train(model: nn.Module) -> None:
    """Make `Trainer` accept the model, which it asks through its quantizer; in place."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, TorchAoHfQuantizer):
        quantizer.__class__ = TrainableTorchAoHfQuantizer


class Int8Experts:
    """The experts of one projection: `[e]` is expert e's weight, valid until the next lookup."""

    def __init__(self, numbers: Tensor, scale: Tensor, dtype: torch.dtype):
        self.numbers, self.scales = numbers.unbind(), scale.unbind()
        self.rows = max(1, CHUNK // numbers.shape[2])
        self.weight = torch.empty_like(self.numbers[0], dtype=dtype)
        self.parts = self.weight.split(self.rows)
        in_place = dtype == scale.dtype
        self.wide = None if in_place else torch.empty_like(self.parts[0], dtype=scale.dtype)

    def __getitem__(self, expert: int) -> Tensor:
        """(out, in), rounded once, as torchao's own `dequantize`; in parts that stay in cache."""
        numbers, scales = (t[expert].split(self.rows) for t in (self.numbers, self.scales))
        for number, scale, part in zip(numbers, scales, self.parts, strict=True):
            wide = part if self.wide is None else self.wide[: len(number)]
            torch.mul(wide.copy_(number), scale, out=wide)
            if wide is not part:
                part.copy_(wide)
        return self.weight


@torch.library.custom_op("vlmoe::int8_grouped_linear", mutates_args=())
def int8_grouped_linear(
    x: Tensor, numbers: Tensor, scale: Tensor, ends: Tensor, is_transposed: bool
) -> Tensor:
    """(S, in) -> (S, out), one expert after the other, on any device; measured on CPUs only.

    Args:
        x: rows sorted by expert.
        numbers, scale: int8 (E, out, in) and (E, out, 1); if `is_transposed` (E, in, out) and
            (E, in, 1).
        ends: (E,) where each expert's rows end; read on the host, which waits for a GPU.
        is_transposed: whether experts are (in, out).
    """
    output = x.new_empty(len(x), numbers.shape[2 if is_transposed else 1])
    weights, start = Int8Experts(numbers, scale, x.dtype), 0
    with torch.autocast(x.device.type, enabled=False):
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                weight = weights[expert] if is_transposed else weights[expert].T
                torch.mm(x[start:end], weight, out=output[start:end])
            start = end
    return output


@int8_grouped_linear.register_fake
def _(x: Tensor, numbers: Tensor, scale: Tensor, ends: Tensor, is_transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], numbers.shape[2 if is_transposed else 1])
