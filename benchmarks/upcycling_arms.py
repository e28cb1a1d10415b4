# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The arms of the upcycling benchmark: their architectures, and what a token costs in each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor, VLMoETextConfig
from vlmoe.training.build import build_model

EXPERTS, TOP_K, SPLIT = 8, 2, 2
WIDTH, HIDDEN, LAYERS = 48, 64, 4  # of the dense decoder; WIDTH is its MLP's
SIZES: dict[str, Any] = {
    "pixel_shuffle_factor": 1,
    "vision_config": {
        "image_size": 48,
        "patch_size": 16,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
    },
    "text_config": {
        "hidden_size": HIDDEN,
        "initializer_range": 0.1,
        "num_hidden_layers": LAYERS,
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
    },
}
"""What differs from the preset `tiny`; the sparse model of the arm "from scratch"."""


@dataclass(frozen=True)
class Arm:
    """One line of the benchmark.

    Attributes:
        label: its name in tables.
        mlp_width: of a dense decoder; None for a sparse one.
        upcycling: options of `from_dense`; None for an arm that does not start so.
        from_scratch: whether it starts at random weights, and takes all steps.
        with_images: False for the baseline that is never shown an image.
    """

    label: str
    mlp_width: int | None = None
    upcycling: dict[str, int] | None = None
    from_scratch: bool = False
    with_images: bool = True


def twin_width(experts: int) -> int:
    """Return the width of a dense MLP of the same size as `experts` experts and their router."""
    return round(experts * WIDTH + EXPERTS / 3)  # an MLP has 3 * hidden per unit of width


PLATEAU, BASELINE = "plateau", "dense"
ARMS = {
    PLATEAU: Arm("dense at its plateau", mlp_width=WIDTH, from_scratch=True),
    BASELINE: Arm("dense, continued"),
    "upcycled": Arm(
        f"upcycled, {EXPERTS} experts, top {TOP_K}",
        upcycling={"num_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    ),
    "upcycled_split": Arm(
        f"upcycled, {EXPERTS} x {SPLIT} experts, top {SPLIT}",
        upcycling={"num_experts": EXPERTS, "num_experts_per_tok": 1, "expert_split": SPLIT},
    ),
    "sparse_scratch": Arm(f"from scratch, {EXPERTS} experts, top {TOP_K}", from_scratch=True),
    "dense_total": Arm("dense twin, equal total", mlp_width=twin_width(EXPERTS), from_scratch=True),
    "dense_active": Arm("dense twin, equal active", mlp_width=twin_width(TOP_K), from_scratch=True),
    "question_only": Arm(
        "dense, never shown an image", mlp_width=WIDTH, from_scratch=True, with_images=False
    ),
}


def build(arm: Arm, seed: int, tokenizer: Path, dense: Path) -> tuple[Any, VLMoEProcessor]:
    """Build the model of an arm before its first step, and its processor.

    Args:
        arm: which.
        seed: of new weights.
        tokenizer: a folder.
        dense: the folder of the dense model at its plateau, which continued arms start from.
    """
    set_seed(seed)
    if arm.from_scratch:
        return new_model(arm.mlp_width, tokenizer)
    if arm.upcycling is None:
        return build_model(str(dense))
    model = VLMoEForConditionalGeneration.from_dense(str(dense), seed=seed, **arm.upcycling)
    return model.train(), VLMoEProcessor.from_pretrained(dense)


def new_model(mlp_width: int | None, tokenizer: Path) -> tuple[Any, VLMoEProcessor]:
    """Build a model with random weights: dense of that width, or sparse where it is None."""
    text = dict(SIZES["text_config"])
    if mlp_width is not None:
        text |= {"intermediate_size": mlp_width, "mlp_only_layers": list(range(LAYERS))}
    overrides = SIZES | {"text_config": text}
    return build_model("tiny", tokenizer=str(tokenizer), model_overrides=overrides)


def flops_per_token(text: VLMoETextConfig, length: int) -> float:
    """Floating point operations of the decoder's matrix products, forward, for one token.

    Counted from the configuration: two per multiply-accumulate of projections, attention (all of
    `length` keys, as without causal savings), the MLP or the router and the chosen experts, and
    the head. Norms, rotations, activations and softmax are left out, as `FlopCounterMode` does.
    """
    query = text.num_attention_heads * text.head_dim
    key_value = text.num_key_value_heads * text.head_dim
    attention = text.hidden_size * (2 * query + 2 * key_value) + 2 * length * query
    products = text.hidden_size * text.vocab_size
    for layer in range(text.num_hidden_layers):
        products += attention
        if text.is_sparse_layer(layer):
            active = text.num_experts_per_tok + text.num_shared_experts
            products += text.hidden_size * text.num_experts
            products += 3 * text.hidden_size * text.moe_intermediate_size * active
        else:
            products += 3 * text.hidden_size * text.intermediate_size
    return 2.0 * products
