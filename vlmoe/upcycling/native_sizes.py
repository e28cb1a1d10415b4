# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The sizes of a native sparse model's experts, and the layers that have them."""

from typing import Any

from transformers import PreTrainedConfig

from .native_pairs import Pair
from .options import Upcycling


def dense_width(dense: PreTrainedConfig) -> int:
    """Return the inner width of the dense MLP, which LFM2 derives from its configuration."""
    width = dense.intermediate_size
    if dense.model_type != "lfm2" or not dense.block_auto_adjust_ff_dim:
        return width
    width = int(2 * width / 3)
    if dense.block_ffn_dim_multiplier is None:
        return width
    width = int(dense.block_ffn_dim_multiplier * width)
    return -(-width // dense.block_multiple_of) * dense.block_multiple_of


def native_sizes(dense: PreTrainedConfig, pair: Pair, options: Upcycling) -> dict[str, Any]:
    """Return the fields for the experts' sizes.

    Raises:
        ValueError: the sparse class cannot have what the options ask for.
    """
    width, split = dense_width(dense), options.expert_split
    if width % split:
        raise ValueError(
            f"`expert_split` is {split}; allowed: divisors of the dense model's "
            f"`intermediate_size`, {width}."
        )
    if not 1 <= options.num_experts_per_tok <= options.num_experts:
        raise ValueError(
            f"`num_experts_per_tok` is {options.num_experts_per_tok}; allowed: 1 to "
            f"num_experts={options.num_experts}."
        )
    if pair.sparse == "qwen3_vl_moe_text":
        _require_oblong(dense.hidden_size, width // split, split)
    sizes: dict[str, Any] = {"intermediate_size": width} | {
        pair.num_experts: options.num_experts * split,
        pair.top_k: options.num_experts_per_tok * split,
        pair.width: width // split,
    }
    sizes |= _weights(pair, options)
    if pair.silent_branch:
        sizes["enable_moe_block"] = True
    layers = _layers(dense.num_hidden_layers, pair, options)
    return sizes | _shared(width, pair, options) | layers


def _weights(pair: Pair, options: Upcycling) -> dict[str, bool]:
    """Return the field that says whether the weights of the chosen experts add up to 1."""
    if options.normalizes:  # as `pair.fields` says
        return {}
    if pair.takes_scores:
        return {"norm_topk_prob": False}
    raise ValueError(
        f"`num_experts_per_tok` is 1 without `norm_topk_prob=True`, and the routers of "
        f"{pair.sparse!r} always normalize, so that no gradient of the task reaches them; allowed: "
        'norm_topk_prob=True, num_experts_per_tok of 2 or more, or target="vlmoe".'
    )


def _require_oblong(hidden: int, width: int, split: int) -> None:
    """Refuse banks that transformers cannot tell from their transpose when it loads them.

    Qwen3-VL-MoE is published as (E, H, 2 I) and is transposed on loading where the shape differs.
    """
    for name, size in (("the width of an expert", width), ("twice the width", 2 * width)):
        if size == hidden:
            raise ValueError(
                f"`expert_split` is {split}: {name} would be {size}, the hidden size, and "
                "transformers would load the published layout of Qwen3-VL-MoE wrongly; choose "
                "another split."
            )


def _shared(width: int, pair: Pair, options: Upcycling) -> dict[str, Any]:
    """Return the fields of the shared expert; one that is not asked for adds nothing."""
    shared, asked = pair.shared, options.expert_init == "shared"
    if shared is None:
        if asked:
            raise ValueError(
                f"`expert_init` is 'shared', and {pair.sparse!r} has no shared expert; allowed: "
                'copy, drop, noise, another `sparse_type`, or target="vlmoe".'
            )
        return {}
    there = asked or shared.required
    if shared.width is not None:
        own = width if asked else width // options.expert_split
        return {shared.width: own if there else 0}
    return {} if shared.count is None else {shared.count: int(there)}


def _layers(count: int, pair: Pair, options: Upcycling) -> dict[str, Any]:
    """Return the fields that say which layers are sparse."""
    sparse = options.sparse_layer_indices(count)
    first, last = sparse[0], sparse[-1]
    is_tail = sparse == list(range(first, count))
    is_run = sparse == list(range(first, last + 1))
    fields = pair.sparse_layers
    if fields == "mlp_only_layers":
        return {fields: [i for i in range(count) if i not in sparse], "decoder_sparse_step": 1}
    if isinstance(fields, str) and is_tail:
        return {fields: first}
    if isinstance(fields, tuple) and is_run:
        return dict(zip(fields, (first, last), strict=True))
    if fields is None and len(sparse) == count:
        return {}
    allowed = "all layers" if fields is None else "layers up to the last, without a gap"
    raise ValueError(
        f"`sparse_layers` is {options.sparse_layers!r}; {pair.sparse!r} allows: {allowed}. For "
        'others there is target="vlmoe".'
    )
