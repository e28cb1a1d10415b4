# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Load a saved VLMoE and its processor: whole, finite, and with a chat template that ends."""

import os
from pathlib import Path

import torch

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration
from ..processing.processing_vlmoe import VLMoEProcessor
from .finite_weights import require_finite
from .input_errors import reading
from .template_trial import try_templates
from .whole_model import model_problems

Source = str | os.PathLike[str]
"""A folder or a Hub id."""


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


def read_config(source: Source) -> VLMoEConfig:
    """Read the config of a saved model.

    Raises:
        InputError: there is none, or it has wrong values.
    """
    with reading(f"{source}/config.json"):
        return VLMoEConfig.from_pretrained(source)


def read_processor(source: Source) -> VLMoEProcessor:
    """Read the processor of a saved model and try its chat template.

    Raises:
        InputError: it cannot be read, or the template does not end.
    """
    with reading(f"The processor of {source}"):
        processor = VLMoEProcessor.from_pretrained(source)
    try_templates(processor.chat_template, str(source))
    return processor


def load_model(
    source: Source, config: VLMoEConfig | None = None, dtype: torch.dtype | None = None
) -> VLMoEForConditionalGeneration:
    """Load a saved model whose weights are all there and all finite.

    Args:
        source: a folder or a Hub id.
        config: in place of the model's own.
        dtype: of the weights; by default the saved one.

    Raises:
        ValueError: they are not, or do not fit the config.
    """
    config = config or read_config(source)
    with reading(f"The weights of {source}"):
        model = VLMoEForConditionalGeneration.from_pretrained(
            source, config=config, dtype=dtype or "auto"
        )
    require_finite(model.state_dict().items(), str(source))
    return model
