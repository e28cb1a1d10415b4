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
    """The shared expert of a sparse class: it adds its output to that of the routed experts.

    Attributes:
        width: the field of its width, or None where that follows from `count`.
        count: the field of the number of shared experts, or None where there is always one.
        required: the class has no version without it.
        of: one shared expert has the width of a routed one ("moe") or `intermediate_size`
            ("dense"), where `width` is None.
        fields: values that make the class add the two outputs.
    """

    width: str | None = None
    count: str | None = None
    required: bool = False
    of: str = "moe"
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """How a dense text model becomes a sparse one of transformers.

    Attributes:
        sparse: `model_type` of the sparse configuration.
        num_experts, top_k, width: its fields for the number of experts, those that a token is
            routed to, and the width of one.
        fields: values that the sparse class needs in order to compute the dense function, where
            its defaults differ.
        also: fields that the sparse class reads without declaring them.
        shared: its shared expert, if the class has one.
        sparse_layers: how it says which layers are sparse: the field `mlp_only_layers`, or a field
            of the number of dense layers at the start; None: all are.
        partial_rotary: it can rotate a part of each head.
        note: for the table in the documentation.
    """

    sparse: str
    num_experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    fields: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    shared: SharedExpert | None = None
    sparse_layers: str | None = None
    partial_rotary: bool = False
    note: str = ""


NORMALIZED = {"norm_topk_prob": True}
LOCAL = {"num_experts": "num_local_experts", "width": "intermediate_size"}
GATED = SharedExpert(width="shared_expert_intermediate_size", required=True)
MIXTRAL = Pair("mixtral", **LOCAL, fields={"router_jitter_noise": 0.0, "sliding_window": None})
GLM4_MOE = Pair(
    "glm4_moe",
    num_experts="n_routed_experts",
    fields=NORMALIZED
    | {
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "use_qk_norm": False,
    },
    also=("head_dim",),
    shared=SharedExpert(count="n_shared_experts", required=True),
    sparse_layers="first_k_dense_replace",
    partial_rotary=True,
    note="a sigmoid router with a selection bias, for bias balancing",
)

TEXT_PAIRS: Mapping[str, tuple[Pair, ...]] = {
    "qwen3_vl_text": (
        Pair(
            "qwen3_vl_moe_text",
            num_experts="num_local_experts",
            fields={"sliding_window": None},
            sparse_layers="mlp_only_layers",
        ),
    ),
    "qwen3": (
        Pair(
            "qwen3_moe",
            num_experts="num_local_experts",
            fields=NORMALIZED,
            also=("head_dim",),
            sparse_layers="mlp_only_layers",
        ),
    ),
}
"""Pairs by the dense text model's type; the first is the default."""

WHOLE_PAIRS: Mapping[str, str] = {"qwen3_vl": "qwen3_vl_moe"}
"""Vision-language models whose sparse version is a class of its own."""

CONTAINERS = ("llava",)
"""Vision-language models that hold any language model: the class stays."""

REFUSED: Mapping[str, str] = {}
"""Models without an exact sparse version, and why."""
