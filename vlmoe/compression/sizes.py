# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The sizes that a compressed model may have, and their fields in its configuration."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..routing.routed_layers import RoutedLayer
from .banks import down_of
from .subsets import renumbered

WIDTH_FIELDS = ("moe_intermediate_size", "intermediate_size")
SHARED_FIELDS = ("num_shared_experts", "n_shared_experts")
"""Numbers of shared experts, whose common width is a multiple of that of the routed ones."""
COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
GROUP_FIELDS = ("n_group", "num_expert_group")
KERNEL_BYTES = 16
"""grouped_mm, transformers' default, multiplies rows of whole 16 bytes."""

Shapes = dict[str, tuple[int, ...]]


def allowed_width(
    layers: Sequence[RoutedLayer], width: int | None, share: float | None, round_up: bool = False
) -> int:
    """Return the new width of the experts.

    Args:
        layers: whose banks have the same width.
        width: the width that was asked for; or
        share: of the present width, in 0..1; the next width that grouped_mm takes.
        round_up: take the next width that grouped_mm takes, too, for a given `width`.

    Raises:
        ValueError: the width is out of range, or grouped_mm does not take it.
    """
    down = down_of(layers[0].experts)
    present, step = down.shape[-1], KERNEL_BYTES // down.element_size()
    if share is not None:
        if not 0 < share < 1:
            raise ValueError(f"`keep` is {share}; allowed: more than 0 and less than 1.")
        width, round_up = math.ceil(share * present), True
    assert width is not None  # one of the two is given
    if round_up:
        width = -(-width // step) * step
    if not 1 <= width < present:
        raise ValueError(
            f"`intermediate_size` is {width}; allowed: 1 to {present - 1}, less than the present "
            "width."
        )
    if width % step:
        near = width // step * step
        raise ValueError(
            f"`intermediate_size` is {width}, and grouped_mm takes multiples of {step} in "
            f"{down.dtype}: take {f'{near} or ' if near else ''}{near + step}, or round it up "
            "(round_up=True, --round_up)."
        )
    return width


def expert_groups(
    config: PreTrainedConfig, layer: RoutedLayer, count: int
) -> tuple[list[list[int]], list[int]]:
    """Return the experts that are chosen from together, and how many of each group stay.

    Groups of a router (`n_group`) stay equally large. Of `modality_experts` those of the same
    modalities form a group, which keeps its share. Otherwise all experts are one group.

    Raises:
        ValueError: `count` is out of range, does not divide into the groups, or leaves a modality
            with fewer than k experts.
    """
    text, experts, k = config.get_text_config(), layer.num_experts, layer.top_k
    if not k <= count < experts:
        raise ValueError(
            f"`experts` is {count}; allowed: {k} (num_experts_per_tok) to {experts - 1}, fewer "
            "than the present experts."
        )
    number = next((n for f in GROUP_FIELDS if (n := getattr(text, f, None))), 1)
    if number > 1:
        if count % number:
            raise ValueError(f"`experts` is {count}; allowed: multiples of n_group={number}.")
        size = experts // number
        groups = [list(range(size * n, size * (n + 1))) for n in range(number)]
        chosen_from = getattr(text, "topk_group", number)
        if chosen_from * (count // number) < k:
            raise ValueError(
                f"`experts` is {count}: {chosen_from} groups (topk_group) of {count // number} "
                f"have fewer than the {k} experts of a token (num_experts_per_tok)."
            )
        return groups, [count // number] * number
    by_modality = getattr(text, "modality_experts", None)
    if by_modality is None:
        return [list(range(experts))], [count]
    return _modality_groups(by_modality, experts, count, k)


def _modality_groups(
    by_modality: dict[str, list[int]], experts: int, count: int, k: int
) -> tuple[list[list[int]], list[int]]:
    members: dict[tuple[str, ...], list[int]] = {}
    for expert in range(experts):
        serves = tuple(name for name, its in by_modality.items() if expert in its)
        members.setdefault(serves, []).append(expert)
    shares = [count * len(group) / experts for group in members.values()]
    counts = [int(share) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda n: counts[n] - shares[n])
    for number in by_rest[: count - sum(counts)]:
        counts[number] += 1
    for name in by_modality:
        left = sum(n for serves, n in zip(members, counts, strict=True) if name in serves)
        if left < k:
            raise ValueError(
                f"`experts` is {count}: {left} of them would serve {name} tokens, fewer than the "
                f"{k} experts of a token (num_experts_per_tok)."
            )
    return list(members.values()), counts


def set_width(model: PreTrainedModel, present: int, width: int) -> None:
    """Write the new width into the configuration of a model whose banks have it already.

    Args:
        model: with banks of the new width.
        present: the width before.
        width: the new one.

    Raises:
        ValueError: no field of the configuration describes such a model.
    """
    _set_fields(model, width_fields(model.config.get_text_config(), present, width), width)


def set_count(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Write the new number of experts, and what counts experts, into the configuration.

    Args:
        model: whose banks are cut already.
        kept: the experts that one of the layers kept, group by group.

    Raises:
        ValueError: no field of the configuration describes such a model.
    """
    text = model.config.get_text_config()
    lists = getattr(text, "modality_experts", None)
    if lists is not None:
        # every layer keeps as many of each group, group by group: the numbers are the same in all
        text.modality_experts = renumbered(lists, kept)
        spread = text.router_global_entropy_experts
        if spread is not None:
            sizes = {name: len(its) for name, its in text.modality_experts.items()}
            text.router_global_entropy_experts = {n: min(c, sizes[n]) for n, c in spread.items()}
    fields = ({name: len(kept)} for name in COUNT_FIELDS if hasattr(text, name))
    _set_fields(model, fields, len(kept))


def width_fields(text: PreTrainedConfig, present: int, width: int) -> Iterator[dict[str, int]]:
    """Yield the fields that may give the width, with those that keep shared experts as they are."""
    for name in WIDTH_FIELDS:
        if getattr(text, name, None) != present:
            continue
        yield {name: width}
        for shared in SHARED_FIELDS:
            total = (getattr(text, shared, None) or 0) * present
            if total and total % width == 0:
                yield {name: width, shared: total // width}


def with_fields(config: PreTrainedConfig, fields: Mapping[str, int]) -> PreTrainedConfig:
    """Return a copy of a configuration with other numbers in its text part."""
    changed = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(changed.get_text_config(), name, value)
    return changed


def shapes_of(model: PreTrainedModel) -> Shapes:
    """Return the shapes of a model's tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def has_shapes(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, shapes: Shapes
) -> bool:
    """Return whether a model of this configuration has these tensors; it is made without memory."""
    with torch.device("meta"):
        return shapes_of(model_class(config)) == shapes


def _set_fields(
    model: PreTrainedModel, candidates: Iterable[Mapping[str, int]], value: int
) -> None:
    """Set the fields that, on a model without memory, give the shapes that this model has."""
    config, shapes, tried = model.config, shapes_of(model), []
    for fields in candidates:
        tried += list(fields)
        if has_shapes(type(model), with_fields(config, fields), shapes):
            for name, number in fields.items():
                setattr(config.get_text_config(), name, number)
            return
    raise ValueError(
        f"No field of {type(config).__name__} ({', '.join(dict.fromkeys(tried))}) describes a "
        f"{type(model).__name__} whose experts alone have that size ({value}): other parts, such "
        "as shared experts, follow the same field."
    )
