# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Quantised experts: nearly all of a sparse model's bytes, and what quantisers skip in silence.

- Most methods know linear layers only; the experts are 3-D parameters, which torchao reaches by
  their names. `expert_int8_config` gives the config that does.
- torchao's tensors can be sliced and multiplied one expert at a time, as `eager` and `auto` do; the
  batched and grouped kernels do not take them.
"""

from typing import Any

import torch
from torch import nn
from transformers import TorchAoConfig

from .experts_dispatch import is_torchao
from .sparse_moe import VLMoEExperts
from .vision_experts import VLMoEBiasedExperts

EXPERT_PARAMETERS = r"re:(.*\.)?experts\.(gate_up_proj|up_proj|down_proj)"
LINEAR_LAYERS_ONLY = ("bitsandbytes", "quanto", "hqq", "eetq")
REMEDY = (
    "Load with `quantization_config=TorchAoConfig(FqnToConfig({"
    f'r"{EXPERT_PARAMETERS}": Int8WeightOnlyConfig()'
    "}))` (TorchAoConfig from transformers, the others from torchao.quantization; "
    "`vlmoe.expert_int8_config()` makes it) and `experts_implementation='eager'`, 'auto' or none."
)


def expert_int8_config() -> TorchAoConfig:
    """Int8 weights with a scale per row for the experts, everything else as it is; needs torchao.

    A row of n bf16 weights, 2 n bytes, becomes n + 3 bytes. `save_pretrained` and `from_pretrained`
    keep the quantised weights.
    """
    try:
        from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ImportError("Int8 experts need torchao: pip install torchao") from error
    return TorchAoConfig(FqnToConfig({EXPERT_PARAMETERS: Int8WeightOnlyConfig()}))


def check_quantization_config(config: Any) -> None:
    """Before anything is loaded, refuse a config that is known to leave experts as they are.

    Raises:
        ValueError: the config's method, or torchao config, quantises linear layers only.
    """
    method = getattr(config, "quant_method", None)
    given = type(getattr(config, "quant_type", config)).__name__
    if method in LINEAR_LAYERS_ONLY or (method == "torchao" and given != "FqnToConfig"):
        raise ValueError(f"`quantization_config`: {given} quantises no experts. {REMEDY}")


def check_quantized_experts(model: nn.Module) -> None:
    """After a quantised model was loaded, refuse it if an expert weight kept its bytes.

    Raises:
        ValueError: naming the first such parameter.
    """
    for name, parameter in _expert_parameters(model):
        if type(parameter.data) is torch.Tensor and parameter.dtype.itemsize > 1:
            raise ValueError(
                f"The quantisation left {name} unquantised, in {parameter.dtype}. {REMEDY}"
            )


def quantized_experts(model: nn.Module) -> list[str]:
    """Names of the expert weights that are torchao tensors."""
    return [name for name, parameter in _expert_parameters(model) if is_torchao(parameter)]


def check_experts_implementation(model: nn.Module, implementation: str | dict | None) -> None:
    """Refuse an implementation that cannot multiply the model's quantised experts.

    Raises:
        ValueError: experts are torchao tensors and the implementation is not `eager` or `auto`.
    """
    given = set(implementation.values() if isinstance(implementation, dict) else [implementation])
    if given - {"eager", "auto"} and quantized_experts(model):
        raise ValueError(
            f"`experts_implementation` {implementation!r} cannot multiply quantised experts; "
            f"allowed: 'eager', 'auto'. {REMEDY}"
        )


def _expert_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and weights, without biases: of decoder, vision tower and connector."""
    return [
        (f"{name}.{parameter_name}", parameter)
        for name, module in model.named_modules()
        if isinstance(module, (VLMoEExperts, VLMoEBiasedExperts))
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if not parameter_name.endswith("_bias")
    ]
