"""Dense vision-language models of every family and text backbone that can be upcycled."""

import json
from collections.abc import Callable
from pathlib import Path
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
from dense_sources import GOT_OCR2, IDEFICS3_TOKENS, INTERNVL_TOKENS, SMOLVLM, TEMPLATE
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
    PreTrainedTokenizerBase,
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


@pytest.fixture
def hub_folder(tmp_path: Path) -> Callable[..., Path]:
    """`hub_folder(tokenizer, tokenizer_fields={...}, **{file name: content})`: as on the Hub.

    Contents are dicts, for JSON, or strings. A field that is None is taken out of the tokenizer's.
    """

    def make(
        tokenizer: PreTrainedTokenizerBase,
        tokenizer_fields: dict[str, Any] | None = None,
        **files: dict[str, Any] | str,
    ) -> Path:
        tokenizer.save_pretrained(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        # a tokenizer that was part of a processor once names its class
        fields = json.loads(path.read_text()) | {"processor_class": None} | (tokenizer_fields or {})
        path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


@pytest.fixture
def llava_config(tiny_config):
    """The configuration of a converted Llava model with a CLIP or a SigLIP tower."""

    def make(kind: str) -> Any:
        if kind == "siglip":
            return tiny_config(pixel_shuffle_factor=1)
        return tiny_config(
            vision={"model_type": "clip_vision_model"},
            vision_feature_select_strategy="default",
            pixel_shuffle_factor=1,
        )

    return make


@pytest.fixture
def idefics3_config(tiny_config):
    return tiny_config(vision={"model_type": "idefics3_vision"}, text={"vocab_size": 400})


@pytest.fixture
def internvl_source(hub_folder, with_tokens, tiny_config):
    """`internvl_source(**image processor fields)`: a folder as on the Hub, and its config."""

    def make(**fields: Any) -> tuple[Path, Any]:
        tokenizer = with_tokens(INTERNVL_TOKENS.values())
        extra = {"extra_special_tokens": INTERNVL_TOKENS, "padding_side": None}
        files = {
            "preprocessor_config.json": GOT_OCR2 | fields,
            "processor_config.json": {
                "image_seq_length": 4,
                "processor_class": "InternVLProcessor",
            },
            "chat_template.jinja": TEMPLATE,
        }
        config = tiny_config(
            vision={"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
            text={"vocab_size": 400},
            vision_feature_select_strategy="default",
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        )
        return hub_folder(tokenizer, extra, **files), config

    return make


@pytest.fixture
def smolvlm_source(hub_folder, with_tokens, tiny_config):
    """`smolvlm_source(**image processor fields)`: a folder as on the Hub, and its config."""

    def make(**fields: Any) -> tuple[Path, Any]:
        files = {
            "preprocessor_config.json": SMOLVLM | fields,
            "processor_config.json": {"image_seq_len": 4, "processor_class": "SmolVLMProcessor"},
            "chat_template.json": {"chat_template": TEMPLATE},
        }
        config = tiny_config(vision={"model_type": "smolvlm_vision"}, text={"vocab_size": 400})
        return hub_folder(
            with_tokens(IDEFICS3_TOKENS), {"truncation_side": "left"}, **files
        ), config

    return make
