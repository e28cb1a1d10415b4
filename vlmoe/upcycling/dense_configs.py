# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Translate configurations of dense models that VLMoE can express exactly, field by field.

Other models are refused by name, with the reason; nothing is converted approximately.
"""

from typing import NoReturn

from transformers import PreTrainedConfig

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..configuration.configuration_vlmoe_text import MODEL_TYPE
from ..hub.json_files import JsonObject

GRANITE = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "use_cache",
    "layer_types",
    "sliding_window",
    "no_rope_layers",
    *GRANITE,
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
TEXT_BACKBONES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3")
PIXTRAL_TOWER = "its tower takes images of any size, and VLMoE's tiles have one"
PARALLEL = "its attention and MLP run in parallel from one LayerNorm, and it rotates other pairs"
M_ROPE = "its positions have three axes (M-RoPE)"
REFUSED = {
    "gemma": "its norms multiply by one plus their weight, and it scales token embeddings alone",
    "gemma2": "it has norms after attention and MLP, too, and caps its logits",
    "gemma3": "it has norms after attention and MLP, two rotary tables, and attends both ways",
    "gemma3_text": "it has norms after attention and MLP, too, and two rotary tables",
    "olmo2": "its norms come after attention and MLP, and span all heads at once",
    "cohere": PARALLEL,
    "cohere2": PARALLEL,
    "qwen2_vl": M_ROPE,
    "qwen2_5_vl": M_ROPE,
    "qwen2_vl_text": M_ROPE,
    "qwen2_5_vl_text": M_ROPE,
    "qwen3_vl": f"{M_ROPE}, and its first layers take image features of several depths",
    "qwen3_vl_text": f"{M_ROPE}, and its first layers take image features of several depths",
    "llava_next": "it packs tiles into one grid with a learned line break (anyres)",
    "llava_next_video": "it packs tiles into one grid with a learned line break (anyres)",
    "llava_onevision": "it packs tiles into one grid with a learned line break (anyres)",
    "paligemma": "image and prompt tokens attend both ways (a prefix mask)",
    "idefics2": "a perceiver resamples its image features",
    "mllama": "its layers attend to images by cross-attention",
    "mistral3": PIXTRAL_TOWER,
    "pixtral": PIXTRAL_TOWER,
}


def refuse(model_type: str, reason: str) -> NoReturn:
    """Raise the `ValueError` for a model that is not converted."""
    raise ValueError(
        f"A model of type {model_type!r} cannot be upcycled: {reason}. Allowed: "
        f"{', '.join((*FAMILIES, MODEL_TYPE))} with a language model of type "
        f"{', '.join(TEXT_BACKBONES)}, or a separate vision encoder and language model."
    )


def vlmoe_fields(dense: PreTrainedConfig, tied: bool) -> JsonObject:
    """Return the fields of the `VLMoEConfig` that matches a dense model's configuration.

    `vision_config` and `text_config` are dicts among them, the latter without any field of experts.

    Args:
        dense: configuration of a vision-language model.
        tied: whether its language modelling head is its token embedding.

    Raises:
        ValueError: the model does not fit exactly; the message gives its type and the reason.
    """
    if dense.model_type == MODEL_TYPE:
        return _vlmoe(dense, tied)
    family = FAMILIES.get(dense.model_type)
    if family is None:
        refuse(dense.model_type, REFUSED.get(dense.model_type, "no exact conversion is known"))
    # Vision-language models have their own head, which does not scale logits as Granite's does.
    text = text_fields(dense.text_config, tied) | {"logits_scaling": 1.0}
    return {
        "text_config": text,
        "vision_config": vision_fields(dense.vision_config),
        "image_token_id": dense.image_token_id,
        "tie_word_embeddings": tied,
        **family(dense),
    }


def text_fields(dense: PreTrainedConfig, tied: bool) -> JsonObject:
    """Return the fields of the `VLMoETextConfig` of a dense decoder.

    Raises:
        ValueError: as `vlmoe_fields`.
    """
    kind = dense.model_type
    if kind not in TEXT_BACKBONES:
        has_experts = any(hasattr(dense, name) for name in ("num_experts", "num_local_experts"))
        unknown = "it has experts already" if has_experts else "no exact conversion is known"
        refuse(kind, REFUSED.get(kind, unknown))
    if getattr(dense, "mlp_bias", False):
        refuse(kind, "its MLPs have biases (`mlp_bias`), which VLMoE's experts do not")
    rope = dense.rope_parameters or {}
    if rope.get("rope_type") == "longrope":
        refuse(kind, "its rotary table changes with the length of the text (longrope)")
    fields = {name: getattr(dense, name) for name in SAME_NAME if hasattr(dense, name)}
    bias = bool(getattr(dense, "attention_bias", False))
    return fields | {
        "qkv_bias": bias or kind == "qwen2",
        "o_bias": bias and kind != "qwen2",
        "qk_norm": kind == "qwen3",
        "tie_word_embeddings": tied,
    }


def vision_fields(dense: PreTrainedConfig) -> JsonObject:
    """Return a vision encoder's configuration as a dict.

    Raises:
        ValueError: the tower takes images of any size.
    """
    if getattr(dense, "image_size", None) is None or dense.model_type == "pixtral":
        refuse(dense.model_type, PIXTRAL_TOWER)
    return dense.to_dict()


def _llava(dense: PreTrainedConfig) -> JsonObject:
    return {
        "vision_feature_layer": dense.vision_feature_layer,
        "vision_use_last_hidden_state": False,
        "vision_feature_select_strategy": dense.vision_feature_select_strategy,
        "projector_hidden_act": dense.projector_hidden_act,
        "multimodal_projector_bias": dense.multimodal_projector_bias,
    }


def _internvl(dense: PreTrainedConfig) -> JsonObject:
    factor = round(1 / dense.downsample_ratio)
    if factor * dense.downsample_ratio != 1:
        reason = f"its `downsample_ratio` is {dense.downsample_ratio}, not one over a whole number"
        refuse(dense.model_type, reason)
    return {
        "vision_feature_layer": dense.vision_feature_layer,
        "vision_use_last_hidden_state": dense.vision_feature_layer == -1,
        "vision_feature_select_strategy": dense.vision_feature_select_strategy,
        "projector_hidden_act": dense.projector_hidden_act,
        "pixel_shuffle_factor": factor,
        "projector_layer_norm": True,
    }


def _idefics3(dense: PreTrainedConfig) -> JsonObject:
    return {
        "pixel_shuffle_factor": dense.scale_factor,
        "projector_num_layers": 1,
        "multimodal_projector_bias": False,
    }


FAMILIES = {"llava": _llava, "internvl": _internvl, "idefics3": _idefics3, "smolvlm": _idefics3}


def _vlmoe(dense: PreTrainedConfig, tied: bool) -> JsonObject:
    """Translate a VLMoE without experts, such as one that was trained dense."""
    text = dense.text_config
    sparse = [i for i in range(text.num_hidden_layers) if text.is_sparse_layer(i)]
    if sparse or dense.vision_num_experts or dense.projector_num_experts:
        refuse(dense.model_type, "it has experts already")
    fields = dense.to_dict()
    own = ("text_config", "auto_map", "architectures", "model_type", "transformers_version")
    known = {name for name in VLMoEConfig().to_dict() if name not in own}
    kept = {name: value for name, value in fields.items() if name in known}
    biases = ("qkv_bias", "o_bias", "qk_norm")
    text_kept = {name: getattr(text, name) for name in (*SAME_NAME, *biases)}
    return kept | {
        "text_config": text_kept | {"tie_word_embeddings": tied},
        "tie_word_embeddings": tied,
    }
