"""Tiny random models of transformers' own sparse architectures, and batches for them.

`FAMILIES` names them; no two sizes are equal where a mix-up of axes could go unseen.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

IMAGE, VIDEO, START, END = 5, 7, 8, 9
"""Token ids of images and videos, and of what stands around them."""
EXPERTS, TOP_K, VOCABULARY, IMAGE_LENGTH = 4, 2, 128, 4
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 8}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN3_MOE = {"num_experts": EXPERTS, "norm_topk_prob": True, "mlp_only_layers": []} | HEAD
GROUPS = {"n_routed_experts": EXPERTS, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
TEXTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS} | HEAD,
    "qwen3_moe": QWEN3_MOE,
    "qwen2_moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 40},
    "olmoe": {"num_experts": EXPERTS},
    "granitemoe": {"num_local_experts": EXPERTS},
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    | HEAD,
    "deepseek_v3": {
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_mtp_layers": 0,
        "num_key_value_heads": 4,
    }
    | GROUPS
    | {"num_experts_per_tok": 2},
    "lfm2_moe": {
        "num_experts": EXPERTS,
        "num_dense_layers": 0,
        "layer_types": ["conv", "full_attention"],
    },
    "qwen3": HEAD,
}
"""Language models, the last one dense."""
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_heads": 3,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
PLAIN_VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
CLIP = PLAIN_VISION | {"model_type": "clip_vision_model", "image_size": 8}
MARKS = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
GLM_MARKS = {
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 10,
    "video_end_token_id": 11,
}
VISIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl_moe": (
        QWEN3_MOE | {"rope_parameters": MROPE},
        QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        MARKS,
    ),
    "qwen3_5_moe": (
        {
            "num_experts": EXPERTS,
            "shared_expert_intermediate_size": 40,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
        }
        | HEAD,
        QWEN_VISION | {"num_position_embeddings": 16},
        MARKS,
    ),
    "glm4v_moe": (
        GROUPS | {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
        QWEN_VISION | {"image_size": 16, "intermediate_size": 36},
        GLM_MARKS,
    ),
    "ernie4_5_vl_moe": (
        {
            "moe_intermediate_size": [24, 20],
            "moe_k": TOP_K,
            "moe_num_experts": EXPERTS,
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        {
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 36,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_merge_size": 2,
        },
        GLM_MARKS,
    ),
    "minimax_m3_vl": (
        {
            "num_local_experts": EXPERTS,
            "dense_intermediate_size": 40,
            "shared_intermediate_size": 20,
            "intermediate_size": 24,
            "rotary_dim": 4,
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["full_attention"] * 2,
        }
        | HEAD,
        PLAIN_VISION | {"temporal_patch_size": 2, "spatial_merge_size": 2},
        {"image_token_index": IMAGE, "video_token_index": VIDEO, "projector_hidden_size": 40},
    ),
    "gemma4": (
        {
            "enable_moe_block": True,
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 5,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
        }
        | HEAD,
        PLAIN_VISION
        | {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 32,
        },
        {"video_token_id": VIDEO, "audio_token_id": 15, "audio_config": None},
    ),
}
"""Vision-language models: fields of the text, of the vision tower and of the whole."""
CONTAINERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava_qwen3_moe": ("llava", "qwen3_moe", CLIP),
    "llava_dense": ("llava", "qwen3", CLIP),
    "internvl_qwen3_moe": (
        "internvl",
        "qwen3_moe",
        PLAIN_VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
    ),
}
"""Containers around another family's language model: type, language model, vision tower."""
SPARSE_TEXTS = tuple(name for name in TEXTS if name != "qwen3")
FAMILIES = (*SPARSE_TEXTS, *VISIONS, "llava_qwen3_moe", "internvl_qwen3_moe")
WITH_BIAS = ("deepseek_v3", "lfm2_moe", "glm4v_moe", "ernie4_5_vl_moe", "minimax_m3_vl")
"""Families whose routers have a selection bias."""


def family_config(name: str, **text_fields: Any) -> Any:
    """Return the config of one of `FAMILIES`, or of the dense "qwen3" and "llava_dense"."""
    text = TEXT | text_fields
    if name in TEXTS:
        return AutoConfig.for_model(name, **TEXT | TEXTS[name] | text_fields)
    if name in VISIONS:
        own, vision, top = VISIONS[name]
        return AutoConfig.for_model(
            name,
            text_config=TEXT | own | text_fields,
            vision_config=vision,
            **{"image_token_id": IMAGE, "tie_word_embeddings": False} | top,
        )
    kind, language, vision = CONTAINERS[name]
    text = TEXT | TEXTS[language] | text_fields | {"model_type": language}
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, image_token_id=IMAGE)


def sparse_family(name: str, seed: int = 0, **text_fields: Any) -> PreTrainedModel:
    """Build a model of `family_config` with random weights, the same ones for a seed."""
    torch.manual_seed(seed)
    config = family_config(name, **text_fields)
    auto = AutoModelForCausalLM if name in TEXTS else AutoModelForImageTextToText
    return auto.from_config(config)


def row(length: int, labels: int, seed: int, images: int = 0) -> dict[str, torch.Tensor]:
    """Return a row of text tokens with images at its start, the last `labels` to be learned."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(20, VOCABULARY, (length,), generator=generator)
    image = torch.tensor([START, *[IMAGE] * IMAGE_LENGTH, END])
    ids = torch.cat([*[image] * images, text])
    learned = torch.full_like(ids, -100)
    if labels:
        learned[-labels:] = ids[-labels:]
    return {
        "input_ids": ids,
        "labels": learned,
        "attention_mask": torch.ones_like(ids),
        "images": torch.randn(images, 3, 16, 16, generator=generator),
    }


class FamilyCollator:
    """Pads rows on the right, and gives images and token types as the model's family takes them."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Texts (batch, length); images as `pixels_of`."""
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {key: pad([row[key] for row in rows], True, fill[key]) for key in fill}
        types = (batch["input_ids"] == IMAGE).long()
        if self.name in VISIONS:
            batch["mm_token_type_ids"] = types
        if self.name == "ernie4_5_vl_moe":
            batch["moe_mm_token_type_ids"] = types
        images = torch.cat([row["images"] for row in rows])
        return batch | (pixels_of(self.name, images) if len(images) else {})


def pixels_of(name: str, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """(images, 3, 16, 16) -> the same as the family's processor gives them; 4 tokens for each."""
    if name.startswith("internvl"):
        return {"pixel_values": images}
    if name.startswith("llava"):
        return {"pixel_values": images[..., :8, :8]}
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    # patches (images, 16, 3 * 4 * 4)
    if name == "gemma4":
        y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        places = torch.stack([x.flatten(), y.flatten()], -1).expand(len(images), -1, -1)
        return {"pixel_values": patches, "image_position_ids": places}
    flat = patches.flatten(0, 1)
    if name != "ernie4_5_vl_moe":
        flat = torch.cat([flat, flat], 1)  # two frames
    grid = torch.tensor([[1, 4, 4]]).expand(len(images), -1)
    return {"pixel_values": flat, "image_grid_thw": grid}
