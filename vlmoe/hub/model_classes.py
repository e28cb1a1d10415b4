# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Saved models of any family: the class of the config, of the model, and loading it whole.

VLMoE's own class refuses weights that are not the model's. For the classes of transformers, which
make up what is missing, it is done here.
"""

import os
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration
from ..modeling_vlmoe.whole_weights import NotWholeError, untied, weight_problems
from .export import refuse_ambiguous_banks


def saved_config(source: str | os.PathLike[str]) -> PreTrainedConfig:
    """Return the config of a saved model, of VLMoE or of a family of transformers."""
    fields, _ = PreTrainedConfig.get_config_dict(source)
    if fields.get("model_type", VLMoEConfig.model_type) == VLMoEConfig.model_type:
        return VLMoEConfig.from_pretrained(source)
    return AutoConfig.from_pretrained(source)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of a model that answers questions, by its config.

    Raises:
        ValueError: there is none for its `model_type`.
    """
    if isinstance(config, VLMoEConfig):
        return VLMoEForConditionalGeneration
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise ValueError(
        f"transformers has no class that answers questions for the model_type "
        f"{config.model_type!r}: give a vision-language or a language model."
    )


def is_native(config: PreTrainedConfig) -> bool:
    """Return whether a model of that config is of a class of transformers, and not VLMoE's own."""
    return not isinstance(config, VLMoEConfig)


def answers_questions(model: nn.Module) -> bool:
    """Return whether the model's class is the one that answers questions for its config."""
    try:
        return isinstance(model, PreTrainedModel) and isinstance(model, model_class(model.config))
    except ValueError:
        return False


def load_whole(
    source: str | os.PathLike[str], config: PreTrainedConfig, **options: Any
) -> PreTrainedModel:
    """Load a model by `from_pretrained`, which must find all of its tensors.

    Args:
        source: a folder or a Hub id.
        config: of the model.
        options: of `from_pretrained`.

    Raises:
        ValueError: the config is of no model that answers questions.
        NotWholeError: tensors are missing, unexpected or of another shape.
    """
    if not is_native(config):
        return VLMoEForConditionalGeneration.from_pretrained(source, config=config, **options)
    refuse_ambiguous_banks(source)
    own_class = model_class(config)
    try:
        model, found = own_class.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except RuntimeError as error:
        if "conversion" not in str(error):
            raise
        problem = "some tensors of a bank of experts are missing or of another shape"
        raise NotWholeError(str(source), own_class.__name__, problem) from error
    problems = weight_problems(
        untied(model, found["missing_keys"]), found["unexpected_keys"], found["mismatched_keys"]
    )
    if problems:
        raise NotWholeError(str(source), own_class.__name__, problems)
    return model
