# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Name the parameters that LoRA adapts on a sparse model, as a plain `peft.LoraConfig`.

PEFT's own ways to name them fail silently: `target_modules="all-linear"` finds no expert, since
experts are 3-D parameters and not linear layers, and names without a match are ignored.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

_LINEAR_PARTS = ("attention", "shared_experts", "connector")
_CONNECTORS = ("connector", "multi_modal_projector", "merger", "resampler_model", "embed_vision")
_ROUTERS = ("router", "gate", "router.proj")  # the last is Gemma 4's
# field: values that experts can be adapted with, and the reason
_ALLOWED_OPTIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "use_dora": ((False,), "the norms of DoRA need the adapted weights of all experts"),
    "lora_bias": ((False,), "the experts have no bias of this form"),
    "fan_in_fan_out": ((False,), "the layout of the experts is known"),
    "init_lora_weights": (
        (True, False, "gaussian"),
        "those made from base weights (PiSSA, OLoRA, orthogonal, ...) know 2-D weights only",
    ),
    "lora_dropout": (
        (0, 0.0),
        "PEFT has no dropout on 3-D parameters; give `vlmoe.add_expert_lora(model, dropout=...)`",
    ),
}
IN_MEMORY = (
    "LoRA needs the experts in memory: load the model with a `device_map` that offloads neither "
    "them nor their layers (to 'cpu' or 'disk'), or with `vlmoe.expert_int8_config()`."
)


class _Match(NamedTuple):
    """One adapted parameter or linear layer."""

    name: str
    part: str
    features: int  # in + out, of all experts together


def expert_lora_config(
    model: PreTrainedModel,
    r: int = 8,
    *,
    lora_alpha: float | None = None,
    experts: Sequence[str] | Mapping[str, int] = ("gate_up_proj", "down_proj"),
    attention: bool = False,
    router: bool = False,
    shared_experts: bool = False,
    connector: bool = False,
    rank_scaling: str | None = None,
    **options: Any,
) -> LoraConfig:
    """Make the `LoraConfig` that adapts a model's experts, and of other parts on request.

    The matched parameters are logged; the model is not changed. Unless `router` is adapted too, it
    is frozen. While no router trains, VLMoE computes no router losses, which would reach only the
    adapters below the routers. Other models add a balance loss wherever `output_router_logits` is
    set: TRL sets it unless its argument `router_aux_loss_coef` is 0.

    Args:
        model: one with fused experts (VLMoE, Qwen3-VL-MoE, Gemma 4 MoE, Mixtral, ...).
        r: rank.
        lora_alpha: as in PEFT; 2 r by default. Where a rank is not r, alpha follows it, so that
            alpha / rank is the same everywhere.
        experts: which parameters of the experts; a mapping gives each its own rank.
        attention, router, shared_experts, connector: whether to adapt these too. Attention is that
            of the text model.
        rank_scaling: None, or "per_active_expert", which divides the experts' rank by the number of
            experts per token, so that a token passes as many ranks as in a dense model
            (https://thinkingmachines.ai/blog/lora/).
        options: further fields of `LoraConfig`.

    Raises:
        ValueError: a rank is no positive integer, a requested part matches nothing, or an option
            cannot be used on experts, or the experts are offloaded.
    """
    _check_options(options)
    matches = _expert_matches(model, experts)
    wanted = {"attention": attention, "shared_experts": shared_experts, "connector": connector}
    banks = [match.name.rpartition(".")[0] for match in matches]
    for part in _LINEAR_PARTS:
        if wanted[part]:
            matches += _linear_matches(model, banks, part)
    if router:
        matches += _router_matches(model, banks)
    ranks = _ranks(model, r, experts, rank_scaling, {match.part for match in matches})
    alpha = 2 * r if lora_alpha is None else lora_alpha
    logger.info(_report(matches, ranks, alpha / r))
    return _config(model, matches, ranks, r, alpha, options)


def _config(
    model: PreTrainedModel,
    matches: list[_Match],
    ranks: Mapping[str, int],
    r: int,
    alpha: float,
    options: Mapping[str, Any],
) -> LoraConfig:
    """Make the config, with as few patterns for experts as possible.

    PEFT applies patterns of parameters, but warns that they match nothing.
    """
    of_experts = [rank for part, rank in ranks.items() if part not in (*_LINEAR_PARTS, "router")]
    config_rank = r if r in of_experts else min(of_experts)
    patterns = {part: rank for part, rank in ranks.items() if rank != config_rank}
    return LoraConfig(
        r=config_rank,
        lora_alpha=_number(alpha * config_rank / r),
        rank_pattern={_pattern(matches, part): rank for part, rank in patterns.items()},
        alpha_pattern={
            _pattern(matches, part): _number(alpha * rank / r) for part, rank in patterns.items()
        },
        target_modules=sorted(m.name for m in matches if m.part in _LINEAR_PARTS),
        target_parameters=_targets(model, [m for m in matches if m.part not in _LINEAR_PARTS]),
        **{"task_type": "CAUSAL_LM"} | dict(options),
    )


def _check_options(options: Mapping[str, object]) -> None:
    for field in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        if field in options:
            raise ValueError(
                f"`{field}` is determined by this function: choose the parts by `experts`, "
                "`attention`, `router`, `shared_experts`, `connector`, or write a LoraConfig."
            )
    for field, (allowed, why) in _ALLOWED_OPTIONS.items():
        value = options.get(field, allowed[0])
        if not any(
            value == each and isinstance(value, str | bool | int | float) for each in allowed
        ):
            raise ValueError(
                f"`{field}` is {value!r}, which LoRA on experts cannot use: {why}; "
                f"allowed: {list(allowed)}."
            )


def _expert_matches(
    model: PreTrainedModel, experts: Sequence[str] | Mapping[str, int]
) -> list[_Match]:
    """Find the asked parameters of all banks: modules with a 3-D `down_proj`."""
    banks = {
        name: module
        for name, module in model.named_modules()
        if getattr(getattr(module, "down_proj", None), "ndim", 0) == 3
    }
    if not banks or not experts:
        raise ValueError(
            f"{type(model).__name__} has no fused experts (a module with a 3-D `down_proj`), or "
            f"`experts` is empty ({list(experts)}). Adapt dense models by a LoraConfig of PEFT."
        )
    for name, bank in banks.items():
        check_not_offloaded(name, bank)
    shapes = {
        name: {n: p.shape for n, p in bank.named_parameters(recurse=False) if p.ndim == 3}
        for name, bank in banks.items()
    }
    # Banks of a vision tower have other parameters than those of the text model.
    matches = [
        _Match(f"{name}.{parameter}", parameter, known[parameter][0] * sum(known[parameter][1:]))
        for parameter in experts
        for name, known in shapes.items()
        if set(experts) <= known.keys()
    ]
    if not matches:
        known = " or ".join(sorted({str(sorted(each)) for each in shapes.values()}))
        raise ValueError(f"`experts` names {list(experts)}; the model's experts have {known}.")
    return matches


def _linear_matches(model: PreTrainedModel, banks: Iterable[str], part: str) -> list[_Match]:
    decoders = {name.rpartition(".layers.")[0] + ".layers." for name in banks}
    blocks = {name.rpartition(".")[0] + "." for name in banks}

    def belongs(name: str) -> bool:
        path = name.split(".")
        if part == "connector":
            return any(each in path for each in _CONNECTORS)
        if part == "attention":
            inside = any(name.startswith(each.lstrip(".")) for each in decoders)
            return inside and any("attn" in each or "attention" in each for each in path[:-1])
        inside = any(name.startswith(each) for each in blocks)
        return inside and any(each.startswith("shared_expert") for each in path[:-1])

    matches = [
        _Match(name, part, module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and belongs(name)
    ]
    if not matches:
        raise ValueError(
            f"`{part}=True`, but {type(model).__name__} has no linear layer of that kind."
        )
    return matches


def _router_matches(model: PreTrainedModel, banks: Iterable[str]) -> list[_Match]:
    """Find the routers: modules beside the experts, with a weight (experts, hidden)."""
    matches = []
    for block in dict.fromkeys(name.rpartition(".")[0] for name in banks):
        parameters = dict(model.get_submodule(block).named_parameters())
        for name in _ROUTERS:
            weight = parameters.get(f"{name}.weight")
            if weight is not None and weight.ndim == 2:
                matches.append(_Match(f"{block}.{name}.weight", "router", sum(weight.shape)))
    if not matches:
        raise ValueError(f"`router=True`, but {type(model).__name__} has none beside its experts.")
    return matches


def _ranks(
    model: PreTrainedModel,
    r: int,
    experts: Sequence[str] | Mapping[str, int],
    rank_scaling: str | None,
    parts: Iterable[str],
) -> dict[str, int]:
    """Return the rank of each part: a parameter of the experts, or a kind of layer."""
    given = dict(experts) if isinstance(experts, Mapping) else dict.fromkeys(experts, r)
    for field, rank in {"r": r, **{f"experts[{n!r}]": v for n, v in given.items()}}.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
            raise ValueError(f"`{field}` is {rank!r}; a rank is a positive integer.")
    if rank_scaling not in (None, "per_active_expert"):
        raise ValueError(
            f"`rank_scaling` is {rank_scaling!r}; allowed: None or 'per_active_expert'."
        )
    if rank_scaling:
        config = model.config.get_text_config()
        k = getattr(config, "num_experts_per_tok", None) or config.top_k_experts
        for name, rank in given.items():
            if rank % k:
                raise ValueError(
                    f"`rank_scaling='per_active_expert'` divides the rank of {name}, {rank}, by "
                    f"num_experts_per_tok, {k}; give a multiple of {k}."
                )
            given[name] = rank // k
    return {part: given.get(part, r) for part in sorted(parts)}


def _suffixes(matches: Iterable[_Match]) -> list[str]:
    """Return names from the layer on, equal in all layers: "mlp.experts.down_proj"."""
    return sorted({".".join(match.name.split(".")[-3:]) for match in matches})


def _targets(model: PreTrainedModel, matches: list[_Match]) -> list[str]:
    """Return suffixes, or whole names where another parameter has the same suffix."""
    asked, endings = {match.name for match in matches}, tuple(_suffixes(matches))
    found = {name for name, _ in model.named_parameters() if name.endswith(endings)}
    return _suffixes(matches) if found == asked else sorted(asked)


def _pattern(matches: Iterable[_Match], part: str) -> str:
    """Make a regular expression that matches all names of one part."""
    names = [match for match in matches if match.part == part]
    if part not in _LINEAR_PARTS:
        return "|".join(_suffixes(names)).replace(".", r"\.")
    escaped = (match.name.replace(".", r"\.") for match in names)
    return "|".join(sorted({re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", name) for name in escaped}))


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _report(matches: list[_Match], ranks: Mapping[str, int], scaling: float) -> str:
    lines = []
    for part, rank in ranks.items():
        features = [match.features for match in matches if match.part == part]
        name = _suffixes(m for m in matches if m.part == part)[0] if part in ranks else part
        label = part if part in _LINEAR_PARTS else name
        lines.append(f"  {label}: {len(features)} matched, r={rank}, {rank * sum(features):,}")
    total = sum(ranks[match.part] * match.features for match in matches)
    return "\n".join([f"LoRA: {total:,} parameters, alpha / r = {scaling:g}", *lines])


def check_not_offloaded(name: str, bank: nn.Module) -> None:
    """Refuse a bank whose weights Accelerate brings to memory for each forward pass.

    PEFT would leave its adapters without data, and fail in the first forward pass.

    Raises:
        ValueError: naming the first such parameter.
    """
    for parameter_name, parameter in bank.named_parameters(recurse=False):
        if parameter.is_meta and hasattr(bank, "_hf_hook"):
            raise ValueError(f"{name}.{parameter_name} is offloaded. {IN_MEMORY}")
