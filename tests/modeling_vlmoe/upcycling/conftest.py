"""Dense vision-language models of every family and text backbone that can be upcycled."""

from collections.abc import Callable
from typing import Any

import pytest
from dense_fields import (
    GRANITE,
    HALF_ROPE,
    LLAMA3_ROPE,
    TEXT_SIZES,
    VISION_SIZES,
    randomised,
)
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
