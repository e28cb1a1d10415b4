# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The arms of the benchmark of emoji names: architectures and sizes."""

from typing import Any

from capacity_arms import BALANCE, EXPERT_WIDTH, TOP_K, Arm, dense, sparse, twin_width
from emoji_names_data import names_tokenizer

from vlmoe import VLMoEConfig
from vlmoe.data.tokenizer import END, IMAGE, PAD

HIDDEN, LAYERS = 64, 2
COPIES, SHARDS = 8, 3
LENGTH = 16
"""Tokens of a question with its answer, about, for the operations of attention."""
START = 36
"""Width of the dense model that upcycling starts from: 3 parts of 12, and the twin of 8 experts."""
TWIN_8, TWIN, TOTAL = "dense_36", "dense_43", "dense_523"
AGAIN = "dense_43_again"
"""The twin with other weights on the same data: how far two runs of one arm lie apart."""
CONTINUED, COPY, SPLIT = "dense_36_continued", "upcycled_copy", "upcycled_split"
ARMS: dict[str, Arm] = {
    TWIN_8: dense(START, "dense twin of 8 experts"),
    TWIN: dense(twin_width(32), "dense twin of 32 experts"),
    AGAIN: dense(twin_width(32), "the same twin, other weights"),
    "experts_8": sparse(8),
    "experts_32": sparse(32),
    TOTAL: dense(twin_width(32, 32 * EXPERT_WIDTH), "dense, all parameters of 32 experts"),
    CONTINUED: dense(START, "dense, trained on", start=TWIN_8),
    COPY: Arm(
        f"upcycled, {COPIES} copies, top {TOP_K}",
        experts=COPIES,
        width=START,
        upcycling={"num_experts": COPIES, "num_experts_per_tok": TOP_K},
        start=TWIN_8,
    ),
    SPLIT: Arm(
        f"upcycled, {COPIES} copies in {SHARDS} parts, top {SHARDS}",
        experts=COPIES * SHARDS,
        width=START // SHARDS,
        top_k=SHARDS,
        upcycling={"num_experts": COPIES, "num_experts_per_tok": 1, "expert_split": SHARDS},
        start=TWIN_8,
    ),
}
PAIRS = [
    (AGAIN, TWIN),
    ("experts_8", TWIN_8),
    ("experts_32", TWIN),
    ("experts_32", TOTAL),
    (COPY, CONTINUED),
    (SPLIT, CONTINUED),
]
"""Arms whose difference is reported; the first one is the noise floor."""


def config_of(arm: Arm) -> VLMoEConfig:
    """Return the config of an arm's model."""
    tokenizer = names_tokenizer()
    text: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "initializer_range": 0.08,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "qk_norm": True,
        "vocab_size": len(tokenizer),
    }
    if arm.experts:
        text |= {"num_experts": arm.experts, "num_experts_per_tok": arm.top_k}
        text |= {"moe_intermediate_size": arm.width, **BALANCE}
    else:
        text |= {"intermediate_size": arm.width, "mlp_only_layers": list(range(LAYERS))}
    return VLMoEConfig(
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        pixel_shuffle_factor=4,
        projector_layer_norm=True,
        projector_num_layers=1,
        tie_word_embeddings=True,
        vision_config=VISION,
        text_config=text,
    )


VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "image_size": 48,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "patch_size": 12,
    "vision_use_head": False,
}
"""Drawings are seen at 48 x 48 pixels: 16 patches, which the connector puts into one token."""
