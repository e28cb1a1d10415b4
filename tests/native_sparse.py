"""Tiny native sparse models, of the families that tests/native_dense.py has dense models of."""

import torch
from native_dense import LANGUAGE_MODELS, VISION_MODELS, language_config, vision_config
from transformers import PreTrainedConfig, PreTrainedModel

from vlmoe.upcycling.native_target import NativeTarget
from vlmoe.upcycling.options import Upcycling

FAMILIES = [*(name for name in LANGUAGE_MODELS if name != "qwen3_vl_text"), *VISION_MODELS]


def dense_config(family: str) -> PreTrainedConfig:
    make = vision_config if family in VISION_MODELS else language_config
    config: PreTrainedConfig = make(family)
    return config


def sparse_model(family: str) -> PreTrainedModel:
    """A sparse model with random weights, of which none is 0 or shared by experts."""
    target = NativeTarget.for_dense(dense_config(family), Upcycling.of(4, 2))
    torch.manual_seed(0)
    model = target.model_class(target.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()
