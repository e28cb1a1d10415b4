"""Dense vision-language models of every family and text backbone that can be upcycled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GraniteConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolLM3Config,
    SmolVLMConfig,
)

IMAGE = 5  # the image token
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
BACKBONES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama3_rope_bias": (
        LlamaConfig,
        {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "head_dim": 12},
    ),
    "mistral": (MistralConfig, {"sliding_window": 5}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 12}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
    "granite": (GraniteConfig, GRANITE),
    "phi3": (Phi3Config, {"rope_parameters": HALF_ROPE}),
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_SIZES = (*SIZES, "vocab_size", "num_key_value_heads", "max_position_embeddings")
VISION_SIZES = (*SIZES, "image_size", "patch_size")


def llava(text: PreTrainedConfig, vision: dict[str, Any]) -> PreTrainedConfig:
    """CLIP, the last layer but one, without class token."""
    tower = CLIPVisionConfig(**vision)
    return LlavaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE)


def llava_siglip(text: PreTrainedConfig, vision: dict[str, Any]) -> PreTrainedConfig:
    """SigLIP, two layers side by side."""
    features = {"vision_feature_layer": [-2, -1], "vision_feature_select_strategy": "full"}
    tower = SiglipVisionConfig(**vision)
    return LlavaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE, **features)


def internvl(text: PreTrainedConfig, vision: dict[str, Any]) -> PreTrainedConfig:
    """Tied embeddings, by default."""
    return InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)


def idefics3(text: PreTrainedConfig, vision: dict[str, Any]) -> PreTrainedConfig:
    fields = {"image_token_id": IMAGE, "scale_factor": 2}
    return Idefics3Config(text_config=text, vision_config=vision, **fields)


def smolvlm(text: PreTrainedConfig, vision: dict[str, Any]) -> PreTrainedConfig:
    fields = {"image_token_id": IMAGE, "scale_factor": 2}
    return SmolVLMConfig(text_config=text, vision_config=vision, **fields)


FAMILIES = {each.__name__: each for each in (llava, llava_siglip, internvl, idefics3, smolvlm)}


@torch.no_grad()
def randomised(model: nn.Module) -> Any:
    """Weights large enough that every part of the model shows in the logits; norms around one."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        mean = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
        parameter.normal_(mean, 0.2)
    return model.eval()


@pytest.fixture(scope="session")
def text_config(tiny_config: Callable[..., Any]) -> Callable[..., PreTrainedConfig]:
    """`text_config(backbone, **fields)`: a tiny dense language model's."""
    sizes = {name: getattr(tiny_config().text_config, name) for name in TEXT_SIZES}

    def make(backbone: str, **fields: Any) -> PreTrainedConfig:
        config_class, own = BACKBONES[backbone]
        return config_class(**sizes | {"pad_token_id": None} | own | fields)

    return make


@pytest.fixture(scope="session")
def vision_sizes(tiny_config: Callable[..., Any]) -> dict[str, Any]:
    """Fields of a tiny vision tower."""
    return {name: getattr(tiny_config().vision_config, name) for name in VISION_SIZES}


@pytest.fixture(scope="session")
def dense_model(
    text_config: Callable[..., PreTrainedConfig], vision_sizes: dict[str, Any]
) -> Callable[..., PreTrainedModel]:
    """`dense_model(family, backbone)`: with random weights, in eval mode."""

    def make(family: str = "llava", backbone: str = "llama", **text: Any) -> PreTrainedModel:
        config = FAMILIES[family](text_config(backbone, **text), vision_sizes)
        return randomised(AutoModelForImageTextToText.from_config(config))

    return make


@pytest.fixture(scope="session")
def dense_parts(
    text_config: Callable[..., PreTrainedConfig], vision_sizes: dict[str, Any]
) -> Callable[..., tuple[PreTrainedModel, PreTrainedModel]]:
    """`dense_parts(backbone)`: a vision encoder and a language model."""

    def make(backbone: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel]:
        vision = AutoModel.from_config(CLIPVisionConfig(**vision_sizes))
        text = AutoModelForCausalLM.from_config(text_config(backbone))
        return randomised(vision), randomised(text)

    return make
