# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Small random models of transformers' own sparse architectures, and images as they take them."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

IMAGE_TOKEN = 5
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
PATCHES = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 64,
}
LANGUAGE_MODELS = ("qwen3_moe", "mixtral")
TEXT_FIELDS: Mapping[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": []},
    "mixtral": {},
    "qwen3_vl_moe": {"norm_topk_prob": True, "mlp_only_layers": [], "rope_parameters": MROPE},
    "qwen3_5_moe": {
        "shared_expert_intermediate_size": 40,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
    },
    "glm4v_moe": {
        "n_routed_experts": 8,
        "first_k_dense_replace": 0,
        "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
    },
    "gemma4": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 8,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 200,
    },
}
"""Fields of the language model beside those of the common shape."""
VISION_FIELDS: Mapping[str, dict[str, Any]] = {
    "qwen3_vl_moe": PATCHES | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    "qwen3_5_moe": PATCHES | {"num_position_embeddings": 16},
    "glm4v_moe": PATCHES | {"image_size": 16},
    "gemma4": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 16,
    },
}
OTHER_FIELDS: Mapping[str, dict[str, Any]] = {"gemma4": {"audio_config": None}}
BALANCED_BY_CLASS = tuple(name for name in TEXT_FIELDS if name != "gemma4")
"""Models whose class has a balancing loss."""


def native_model(name: str, shape: Mapping[str, Any], coefficient: float) -> PreTrainedModel:
    """Build one of `TEXT_FIELDS`; with its own balancing loss where the coefficient is not 0.

    Args:
        name: of the architecture.
        shape: fields of the language model that all share.
        coefficient: of its own balancing loss.
    """
    text = {**shape, "pad_token_id": 0, **TEXT_FIELDS[name]}
    text |= {"router_aux_loss_coef": coefficient, "output_router_logits": coefficient > 0}
    if name in LANGUAGE_MODELS:
        text["num_local_experts"] = text["num_experts"]
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **text))
    config = AutoConfig.for_model(
        name,
        text_config=text,
        vision_config=VISION_FIELDS[name],
        image_token_id=IMAGE_TOKEN,
        **OTHER_FIELDS.get(name, {}),
    )
    return AutoModelForImageTextToText.from_config(config)


def native_images(name: str, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """(images, 3, 16, 16) -> patches as the model takes them, four image tokens for each image."""
    patches = torch.nn.functional.unfold(pixels, 4, stride=4).transpose(1, 2)
    if name == "gemma4":
        y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        places = torch.stack([x.flatten(), y.flatten()], -1).expand(len(pixels), -1, -1)
        return {"pixel_values": patches, "image_position_ids": places}
    flat = patches.flatten(0, 1)
    grid = torch.tensor([[1, 4, 4]]).expand(len(pixels), -1)
    # two frames: (images * 16, 3 * 2 * 4 * 4)
    return {"pixel_values": torch.cat([flat, flat], 1), "image_grid_thw": grid}
