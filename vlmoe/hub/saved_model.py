# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Load a saved model and its processor: whole, finite, and with a chat template that ends.

The model is a VLMoE, or of a family of transformers: a vision-language or a language model.
"""

import os
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..processing.processing_vlmoe import VLMoEProcessor
from .experts_implementation import suit_experts
from .finite_weights import require_finite
from .input_errors import reading
from .model_classes import is_native, load_whole, saved_config
from .template_trial import try_templates
from .whole_model import model_problems
from .without_video import load_processor

Source = str | os.PathLike[str]
"""A folder or a Hub id."""
Processor: TypeAlias = ProcessorMixin | PreTrainedTokenizerBase
"""What makes a model's inputs; of a language model, its tokenizer."""


def require_model_source(source: Source) -> None:
    """Refuse a source that cannot be loaded, before transformers tries; let Hub ids pass.

    Raises:
        FileNotFoundError: a path that does not exist, or a word that is no Hub id.
        ValueError: a folder without a whole model.
    """
    name, folder = str(source), Path(source).expanduser()
    if folder.exists():
        problems = model_problems(folder)
        if problems:
            raise ValueError(f"{source} holds no whole model: {'; '.join(problems)}.")
        if not (folder / "config.json").exists():
            raise ValueError(
                f"{source} holds an adapter, no model: `vlmoe merge` adds it to its base model."
            )
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"There is no model folder {source}.")
    elif "/" not in name:
        raise FileNotFoundError(f"There is no model folder {source}; a Hub id is USER/NAME.")


def read_config(source: Source) -> PreTrainedConfig:
    """Read the config of a saved model.

    Raises:
        InputError: there is none, it has wrong values, or its model type is unknown.
    """
    with reading(f"{source}/config.json"):
        return saved_config(source)


def read_processor(source: Source) -> Processor:
    """Read the processor of a saved model and try its chat template.

    Raises:
        InputError: it cannot be read, or the template does not end.
    """
    with reading(f"The processor of {source}"):
        processor = _processor(source)
    try_templates(processor.chat_template, str(source))
    return processor


def load_model(
    source: Source, config: PreTrainedConfig | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a saved model whose weights are all there and all finite.

    Experts whose sizes the default implementation refuses are computed by `auto`.

    Args:
        source: a folder or a Hub id.
        config: in place of the model's own.
        dtype: of the weights; by default the saved one.

    Raises:
        ValueError: they are not, or do not fit the config.
    """
    config = config or read_config(source)
    with reading(f"The weights of {source}"):
        model = load_whole(source, config, dtype=dtype or "auto")
    require_finite(model.state_dict().items(), str(source))
    suit_experts(model)
    return model


def is_own_processor(processor: Processor) -> bool:
    """Return whether it is a `VLMoEProcessor`, by the class's name: code from the Hub keeps it."""
    return any(each.__name__ == VLMoEProcessor.__name__ for each in type(processor).__mro__)


def _processor(source: Source) -> Processor:
    """Load the processor; a language model has a tokenizer alone."""
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        return VLMoEProcessor.from_pretrained(source)
    config = read_config(source)
    if not is_native(config):
        return VLMoEProcessor.from_pretrained(source)
    if hasattr(config, "vision_config"):
        return load_processor(source)
    return AutoTokenizer.from_pretrained(source)
