# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The table of native pairs: dense model types and the sparse classes of their families.

A pair names the sparse class, its names for the sizes of experts, and the fields that it needs in
order to compute the dense function. Whatever a pair does not say is found by the conversion: the
configuration rule of native_config.py, and the weight plan of native_plan.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SharedExpert:
    """The shared expert of a sparse class: its output is added to that of the routed experts.

    Attributes:
        width: the field of its width; None: it has the width of a routed expert.
        count: the field of the number of shared experts; None: there is always one.
        required: the class has no version without it.
        gated: a sigmoid scales its output.
    """

    width: str | None = None
    count: str | None = None
    required: bool = False
    gated: bool = False


@dataclass(frozen=True)
class Pair:
    """How a dense text model becomes a sparse one of transformers.

    Attributes:
        sparse: `model_type` of the sparse configuration.
        num_experts, top_k, width: its fields for the number of experts, those that a token is
            routed to, and the width of one.
        fields: values that the sparse class needs in order to compute the dense function; a field
            that the dense configuration has keeps its value.
        also: fields that the sparse class reads without declaring them.
        shared: its shared expert, if the class has one.
        sparse_layers: how it says which layers are sparse: the field `mlp_only_layers`, a field of
            the number of dense layers at the start, or a pair of fields for the first and the last
            sparse layer; None: all layers are sparse.
        partial_rotary: it can rotate a part of each head.
        rope_keys: further keys of `rope_parameters` that it reads.
        silent_branch: the dense MLP stays, and experts are added beside it.
    """

    sparse: str
    num_experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    fields: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    shared: SharedExpert | None = None
    sparse_layers: str | tuple[str, str] | None = None
    partial_rotary: bool = False
    rope_keys: tuple[str, ...] = ()
    silent_branch: bool = False

    @property
    def takes_scores(self) -> bool:
        """Tell whether the weight of one expert can be its score; else it is always 1.

        Cohere2-MoE's softmax is over the chosen experts alone.
        """
        is_over_chosen = self.fields.get("expert_selection_fn") == "softmax"
        return "norm_topk_prob" in self.fields and not is_over_chosen


NORMALIZED = {"norm_topk_prob": True}
GATED = SharedExpert(width="shared_expert_intermediate_size", required=True, gated=True)
M_ROPE_KEYS = ("mrope_section", "mrope_interleaved")
MIXTRAL = Pair(
    "mixtral",
    num_experts="num_local_experts",
    width="intermediate_size",
    fields={"router_jitter_noise": 0.0, "sliding_window": None},
)


def _glm4_moe(**fields: bool) -> Pair:
    """Return the pair of a sigmoid router with a selection bias, for bias balancing."""
    groups = {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1}
    return Pair(
        "glm4_moe",
        num_experts="n_routed_experts",
        fields=NORMALIZED | groups | {"num_nextn_predict_layers": 0, "use_qk_norm": False} | fields,
        also=("head_dim",),
        shared=SharedExpert(count="n_shared_experts", required=True),
        sparse_layers="first_k_dense_replace",
        partial_rotary=True,
    )


TEXT_PAIRS: Mapping[str, tuple[Pair, ...]] = {
    "llama": (MIXTRAL, _glm4_moe()),
    "mistral": (MIXTRAL,),
    "ministral": (MIXTRAL,),
    "ministral3": (MIXTRAL,),
    "phi3": (MIXTRAL,),
    "smollm3": (MIXTRAL,),
    "qwen2": (
        Pair(
            "qwen2_moe",
            fields=NORMALIZED | {"qkv_bias": True},
            shared=GATED,
            sparse_layers="mlp_only_layers",
        ),
        _glm4_moe(attention_bias=True),
    ),
    "qwen3": (
        Pair(
            "qwen3_moe",
            num_experts="num_local_experts",
            fields=NORMALIZED,
            also=("head_dim",),
            sparse_layers="mlp_only_layers",
        ),
        _glm4_moe(use_qk_norm=True),
    ),
    "qwen3_vl_text": (
        Pair(
            "qwen3_vl_moe_text",
            num_experts="num_local_experts",
            fields={"sliding_window": None},
            sparse_layers="mlp_only_layers",
            rope_keys=M_ROPE_KEYS,
        ),
    ),
    "qwen3_5_text": (
        Pair("qwen3_5_moe_text", shared=GATED, partial_rotary=True, rope_keys=M_ROPE_KEYS),
    ),
    "granite": (Pair("granitemoe", num_experts="num_local_experts", width="intermediate_size"),),
    "granite_swa": (
        Pair(
            "granitemoe_swa",
            num_experts="num_local_experts",
            width="intermediate_size",
            shared=SharedExpert(width="shared_intermediate_size"),
        ),
    ),
    "cohere2": (
        Pair(
            "cohere2_moe",
            width="intermediate_size",
            fields=NORMALIZED
            | {"expert_selection_fn": "softmax", "shared_expert_combination_strategy": "sum"},
            shared=SharedExpert(count="num_shared_experts"),
        ),
    ),
    "lfm2": (
        Pair(
            "lfm2_moe",
            fields=NORMALIZED | {"use_expert_bias": True, "routed_scaling_factor": 1.0},
            sparse_layers="num_dense_layers",
        ),
    ),
    "olmo2": (Pair("flex_olmo", width="intermediate_size", fields=NORMALIZED),),
    "hunyuan_v1_dense": (
        Pair(
            "hunyuan_v1_moe",
            top_k="moe_topk",
            width="intermediate_size",
            shared=SharedExpert(required=True),
            rope_keys=("alpha",),
        ),
    ),
    "ernie4_5": (
        Pair(
            "ernie4_5_moe",
            num_experts="moe_num_experts",
            top_k="moe_k",
            fields={"moe_layer_interval": 1, "moe_norm_min": 1e-12},
            also=("head_dim",),
            shared=SharedExpert(count="moe_num_shared_experts"),
            sparse_layers=("moe_layer_start_index", "moe_layer_end_index"),
        ),
    ),
    "gemma4_text": (
        Pair("gemma4_text", top_k="top_k_experts", partial_rotary=True, silent_branch=True),
    ),
}
"""Pairs by the dense text model's type; the first is the default."""

WHOLE_PAIRS: Mapping[str, str] = {"qwen3_vl": "qwen3_vl_moe", "qwen3_5": "qwen3_5_moe"}
"""Vision-language models whose sparse version is a class of its own."""

CONTAINERS = (
    "aya_vision",
    "cohere2_vision",
    "gemma4",
    "idefics3",
    "internvl",
    "lfm2_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "ovis2",
    "smolvlm",
)
"""Vision-language models that hold any language model: the class stays."""

POST_NORMS = "it has norms after attention and MLP, which the sparse class of its family lacks"
NO_CLASS = "transformers has no sparse class of its family"
REFUSED: Mapping[str, str] = {
    "exaone4": "it has no norm before attention and MLP, and the sparse class of its family has",
    "gemma3": NO_CLASS,
    "gemma3_text": NO_CLASS,
    "glm4": POST_NORMS,
    "glm46v": POST_NORMS,
    "glm4v": POST_NORMS,
    "glm4v_text": POST_NORMS,
    "olmo": "its family's sparse class normalizes queries and keys, and its norms have weights",
    "paligemma": NO_CLASS,
    "phimoe": "it has experts already",
    "qwen2_5_vl": "no sparse class has both positions on three axes (M-RoPE) and biases on q, k, v",
    "vlmoe": "its sparse version is of its own class, VLMoE",
    "qwen2_vl": "no sparse class has both positions on three axes (M-RoPE) and biases on q, k, v",
}
"""Models without an exact sparse version, and why."""
