# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The arms of the capacity benchmark: their architectures, sizes and costs."""

from dataclasses import dataclass, field
from typing import Any

from vlmoe import VLMoEConfig
from vlmoe.data.emblems import emblem_config

EXPERT_WIDTH, TOP_K = 16, 2
DENSE_WIDTH, COPIES, SHARDS = 36, 8, 3
"""Of the dense model that upcycling starts from, and of its upcycled forms."""
LENGTH = 29
"""Tokens of a training row, for the operations of attention."""
BALANCE: dict[str, Any] = {"router_aux_loss_scope": "batch", "router_aux_loss_coef": 0.01}


@dataclass(frozen=True)
class Arm:
    """One model of the benchmark.

    Attributes:
        label: its name in tables.
        experts: of the decoder; 0 for a dense MLP.
        width: of the dense MLP, or of an expert.
        top_k: experts of a token.
        balance: fields of the config that balance the experts.
        upcycling: options of `from_dense`; None for an arm that does not start so.
        start: the arm whose trained model this one goes on from.
        length: training steps, as a multiple of the recipe's.
        shown: as for `Emblems.training_rows`.
    """

    label: str
    experts: int = 0
    width: int = EXPERT_WIDTH
    top_k: int = TOP_K
    balance: dict[str, Any] = field(default_factory=lambda: BALANCE)
    upcycling: dict[str, int] | None = None
    start: str | None = None
    length: int = 1
    shown: str = "image"

    @property
    def capacity(self) -> float:
        """MLP parameters over those that a token passes."""
        return self.experts / self.top_k if self.experts else 1


def twin_width(experts: int, active: int = TOP_K * EXPERT_WIDTH) -> int:
    """Return the width of a dense MLP as large as `active` units of experts and their router."""
    return round(active + experts / 3)  # an MLP has 3 * hidden parameters per unit of width


def sparse(experts: int, label: str = "", **fields: Any) -> Arm:
    label = label or f"{experts} experts, top {TOP_K}"
    return Arm(label, experts=experts, **fields)


def dense(width: int, label: str, **fields: Any) -> Arm:
    return Arm(label, width=width, **fields)


TWIN, SPARSE, TOTAL, LONGER = "dense_37", "experts_16", "dense_261", "dense_37_longer"
START, CONTINUED, COPY, SPLIT = "dense_36", "dense_36_continued", "upcycled_copy", "upcycled_split"
WIDE = twin_width(COPIES * SHARDS, DENSE_WIDTH)
WIDE_START, WIDE_CONTINUED = f"dense_{WIDE}", f"dense_{WIDE}_continued"
BLIND, TEXT = "never_shown", "named_in_words"
ARMS: dict[str, Arm] = {
    TWIN: dense(twin_width(16), "dense twin, equal active"),
    SPARSE: sparse(16),
    TOTAL: dense(twin_width(16, 16 * EXPERT_WIDTH), "dense twin, equal total"),
    LONGER: dense(twin_width(16), "dense twin, 3 times the steps", length=3),
    START: dense(DENSE_WIDTH, "dense, to be upcycled"),
    CONTINUED: dense(DENSE_WIDTH, "dense, trained on", start=START),
    WIDE_START: dense(WIDE, f"dense of width {WIDE}"),
    WIDE_CONTINUED: dense(WIDE, f"dense of width {WIDE}, trained on", start=WIDE_START),
    COPY: Arm(
        f"upcycled, {COPIES} copies, top {TOP_K}",
        experts=COPIES,
        width=DENSE_WIDTH,
        upcycling={"num_experts": COPIES, "num_experts_per_tok": TOP_K},
        start=START,
    ),
    SPLIT: Arm(
        f"upcycled, {COPIES} copies in {SHARDS} parts, top {SHARDS}",
        experts=COPIES * SHARDS,
        width=DENSE_WIDTH // SHARDS,
        top_k=SHARDS,
        upcycling={"num_experts": COPIES, "num_experts_per_tok": 1, "expert_split": SHARDS},
        start=START,
    ),
    BLIND: sparse(16, "16 experts, never shown an image", shown="nothing"),
    TEXT: sparse(16, "16 experts, entity named in words", shown="name"),
}
BALANCINGS: dict[str, dict[str, Any]] = {
    f"{scope}_{coefficient}": {
        "router_aux_loss_scope": scope,
        "router_aux_loss_coef": coefficient,
    }
    for scope in ("sequence", "batch")
    for coefficient in (0.001, 0.01)
} | {
    "bias": {"router_aux_loss_coef": 0.0, "router_bias_update_rate": 0.001},
    "bias_sigmoid": {
        "router_aux_loss_coef": 0.0,
        "router_bias_update_rate": 0.001,
        "scoring_func": "sigmoid",
    },
    "off": {"router_aux_loss_coef": 0.0},
}
BALANCE_ARMS = {
    f"experts_16_{name}": sparse(16, f"16 experts, {name.replace('_', ' ')}", balance=fields)
    for name, fields in BALANCINGS.items()
    if fields != BALANCE
}
CURVE_EXPERTS = (2, 4, 8, 16, 32, 64)
CURVE_TWINS = {n: f"dense_{twin_width(max(n, 16))}" for n in CURVE_EXPERTS}
"""The dense arm that has the active size of so many experts with their router, within 2%."""
CURVE = {
    f"dense_{twin_width(n)}": dense(twin_width(n), f"dense twin, width {twin_width(n)}")
    for n in (16, 32, 64)
}
CURVE |= {f"experts_{n}": sparse(n) for n in CURVE_EXPERTS}


@dataclass(frozen=True)
class Study:
    """Arms that are compared on one size of the task.

    Attributes:
        entities: of the task.
        rows: of a batch.
        arms: by name, each after the one that it starts from.
        pairs: arms whose difference is reported: ours, and its peer.
    """

    entities: int
    rows: int
    arms: dict[str, Arm]
    pairs: list[tuple[str, str]]

    @property
    def longest(self) -> int:
        """Training steps of the longest arm, as a multiple of the recipe's."""
        return max(arm.length + (arm.start is not None) for arm in self.arms.values())


STUDIES = {
    "facts_4096": Study(
        512,
        64,
        ARMS | BALANCE_ARMS,
        [
            (SPARSE, TWIN),
            (SPARSE, TOTAL),
            (SPARSE, LONGER),
            (SPLIT, CONTINUED),
            (SPLIT, WIDE_CONTINUED),
            (COPY, CONTINUED),
            *((name, SPARSE) for name in BALANCE_ARMS),
        ],
    ),
    "facts_8192": Study(
        1024,
        128,
        CURVE,
        [
            *((f"experts_{number}", twin) for number, twin in CURVE_TWINS.items()),
            ("experts_64", "experts_16"),
        ],
    ),
}


def config_of(arm: Arm) -> VLMoEConfig:
    """Return the config of an arm's model."""
    if arm.experts:
        experts = {"num_experts": arm.experts, "num_experts_per_tok": arm.top_k}
        return emblem_config(**experts, moe_intermediate_size=arm.width, **arm.balance)
    return emblem_config(intermediate_size=arm.width, mlp_only_layers=[0])
