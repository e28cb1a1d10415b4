"""Tiny dense models that have a native sparse version, one for each row of the table of pairs."""

from typing import Any

import torch
from dense_fields import GRANITE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

IMAGE, VIDEO = 5, 7
TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
WINDOW = ["sliding_attention", "full_attention", "sliding_attention"]
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "ministral": {"sliding_window": 5, "layer_types": ["sliding_attention"] * 3},
    "ministral3": {},
    "phi3": {"head_dim": None, "rms_norm_eps": 1e-5},
    "smollm3": {"head_dim": None, "no_rope_layers": [1, 1, 1]},
    "qwen2": {
        "head_dim": None,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": WINDOW,
    },
    "qwen3": {},
    "granite": {"head_dim": None} | GRANITE,
    "granite_swa": {"head_dim": None, "sliding_window": 5, "layer_types": WINDOW} | GRANITE,
    "cohere2": {"sliding_window": 5, "layer_types": WINDOW, "logit_scale": 0.5},
    "lfm2": {
        "head_dim": None,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_multiple_of": 8,
    },
    "olmo2": {"head_dim": None},
    "hunyuan_v1_dense": {},
    "ernie4_5": {},
    "qwen3_5_text": {
        # a linear layer later on multiplies fp32 rounding: the dense model with the units of its
        # MLPs in another order is then 2e-6 away from itself
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
    },
    "qwen3_vl_text": {"rope_parameters": MROPE},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 5,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 128,
    },
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
}
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
CLIP = VISION | {"model_type": "clip_vision_model"}
ANYRES = {"image_grid_pinpoints": [[16, 32], [32, 16]]}
VISION_MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl": (
        "qwen3_vl_text",
        QWEN_VISION | {"deepstack_visual_indexes": [0, 1]},
        {"video_token_id": VIDEO, "vision_start_token_id": 8, "vision_end_token_id": 9},
    ),
    "qwen3_5": (
        "qwen3_5_text",
        QWEN_VISION,
        {"video_token_id": VIDEO, "vision_start_token_id": 8, "vision_end_token_id": 9},
    ),
    "llava": ("qwen3", CLIP, {}),
    "llava_next": ("granite", CLIP, ANYRES),
    "llava_onevision": ("qwen2", SIGLIP, ANYRES | {"video_token_id": VIDEO}),
    "internvl": ("qwen3", VISION | {"image_size": [16, 16], "patch_size": [4, 4]}, {}),
    "idefics3": ("llama", VISION, {"scale_factor": 2}),
    "smolvlm": ("llama", VISION, {"scale_factor": 2}),
    "mistral3": (
        "mistral",
        VISION | {"model_type": "pixtral", "head_dim": 8},
        {"spatial_merge_size": 2},
    ),
    "aya_vision": (
        "cohere2",
        SIGLIP,
        {"downsample_factor": 2, "vision_feature_select_strategy": "full"},
    ),
    "cohere2_vision": (
        "cohere2",
        SIGLIP,
        {"downsample_factor": 2, "alignment_intermediate_size": 24},
    ),
    "lfm2_vl": (
        "lfm2",
        {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_patches": 16,
            "patch_size": 4,
        },
        {"projector_hidden_size": 24},
    ),
    "ovis2": (
        "qwen2",
        {k: v for k, v in VISION.items()}
        | {"hidden_stride": 1, "vocab_size": 40, "num_visual_indicator_tokens": 5},
        {"visual_indicator_token_ids": [10, 11, 12, 13, 14], "hidden_size": 32, "vocab_size": 128},
    ),
    "gemma4": (
        "gemma4_text",
        VISION
        | {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        {"video_token_id": VIDEO, "audio_token_id": 15, "audio_config": None},
    ),
}


def language_config(kind: str, **fields: Any) -> Any:
    """The configuration of a tiny language model."""
    given = TEXT | LANGUAGE_MODELS[kind] | fields
    given = {name: value for name, value in given.items() if (name, value) != ("head_dim", None)}
    return AutoConfig.for_model(kind, **given)


def vision_config(kind: str, text: str | None = None, **fields: Any) -> Any:
    """The configuration of a tiny vision-language model; `text`: another language model."""
    default, vision, top = VISION_MODELS[kind]
    language = language_config(text or default, **fields).to_dict()
    return AutoConfig.for_model(
        kind, text_config=language, vision_config=vision, **{"image_token_id": IMAGE} | top
    )


@torch.no_grad()
def dense_model(config: Any) -> PreTrainedModel:
    """A model with weights of variance 1 / fan-in; norms are around their initial value."""
    torch.manual_seed(0)
    is_text = config.model_type in LANGUAGE_MODELS
    auto = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    model = auto.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
