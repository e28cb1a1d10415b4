# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Load the dense models of a conversion, and refuse those that cannot be converted exactly."""

import os
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from ..hub.finite_weights import require_finite
from ..hub.meta_loading import meta_device_map, quietly
from ..modeling_vlmoe.whole_weights import NotWholeError, damaged_file, untied, weight_problems

Dense: TypeAlias = PreTrainedModel | str | os.PathLike[str]
"""A dense model: loaded, a folder or a Hub id."""

MODEL_CLASSES = {
    "image-text": AutoModelForImageTextToText,
    "text": AutoModelForCausalLM,
    "vision": AutoModel,
}


def load_dense(source: Dense, kind: str = "image-text") -> tuple[PreTrainedModel, str, set[str]]:
    """Load a dense model in evaluation mode.

    Returns the model, its name for messages, and the names of tensors that its files lack. Only
    vision encoders may lack some: they are often saved without their pooling head.

    Args:
        source: a loaded model, a folder or a Hub id.
        kind: "image-text", "text" or "vision".

    Raises:
        ValueError: the model is quantized, an adapter sits on it, its weights are not those that
            its config describes, or not finite; or a language model is not asked for as "text".
        OSError: a file is missing or damaged.
    """
    if isinstance(source, str | os.PathLike):
        model, missing = _loaded(source, kind)
        require_finite(model.state_dict().items(), str(source))
        return model.eval(), str(source), missing
    name = type(source).__name__
    if not isinstance(source, PreTrainedModel):
        raise ValueError(
            f"`dense` is a {name}; allowed: a model of transformers, a folder or a Hub id. "
            "Merge an adapter first (merge_and_unload)."
        )
    _refuse_quantized(source.config, name)
    if not all(p.is_floating_point() and p.dtype.itemsize > 1 for p in source.parameters()):
        raise ValueError(f"{name} has weights of less than 16 bits; load it without quantization.")
    for buffer_name, buffer in source.named_buffers():
        if buffer_name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise ValueError(
                f"{name}'s rotary table {buffer_name} was rounded to {buffer.dtype}, by `.to` or "
                "`.half`; load the model with from_pretrained(..., dtype=...), which keeps it."
            )
    require_finite(source.state_dict().items(), name)
    return source, name, set()


def _loaded(source: str | os.PathLike[str], kind: str) -> tuple[PreTrainedModel, set[str]]:
    """Load the model, and name what a vision encoder lacks; its folder may hold a whole model."""
    config = AutoConfig.from_pretrained(source)
    _refuse_quantized(config, str(source))
    is_text = kind_of(config) == "text" and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if kind == "image-text" and is_text:
        raise ValueError(
            f"{source} is a language model ({config.model_type}), which sees no images. To make a "
            "VLMoE, join a vision encoder to it: give `vision`."
        )
    load = MODEL_CLASSES[kind].from_pretrained
    judged = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quietly():
            model, info = load(source, dtype="auto", device_map=meta_device_map(), **judged)
        missing, is_part = untied(model, info["missing_keys"]), kind == "vision"
        problems = weight_problems(
            () if is_part else missing,
            () if is_part else info["unexpected_keys"],
            info["mismatched_keys"],
        )
        if problems:
            raise NotWholeError(str(source), type(model).__name__, problems)
        return load(source, dtype="auto"), missing
    except SafetensorError as error:
        raise OSError(damaged_file(Path(source), error)) from error


def dense_config(source: Dense) -> PreTrainedConfig:
    """Read the configuration of a dense model, without its weights."""
    if isinstance(source, str | os.PathLike):
        return AutoConfig.from_pretrained(source)
    return source.config


def kind_of(config: PreTrainedConfig) -> str:
    """Return the kind of a whole model, as `load_dense` takes it."""
    return "image-text" if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else "text"


def _refuse_quantized(config: PreTrainedConfig, name: str) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    method = getattr(method, "quant_method", method)
    raise ValueError(
        f"{name} is quantized ({getattr(method, 'value', method)}): its weights cannot be copied "
        "into experts exactly. Start from the unquantized model."
    )


def is_tied(model: PreTrainedModel) -> bool:
    """Tell whether the language modelling head is the token embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight
