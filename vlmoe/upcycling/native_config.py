# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The configuration of the native sparse model, from the dense model's.

The rule: every field that the sparse class knows is carried. A field that it does not know must be
neutral, that is without effect on the function, or the model is refused; it is then listed as lost.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .native_pairs import CONTAINERS, REFUSED, TEXT_PAIRS, WHOLE_PAIRS, Pair
from .native_sizes import native_sizes
from .options import Upcycling

BOOKKEEPING = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
ROUTER_FIELDS = ("router_aux_loss_coef", "output_router_logits")


@dataclass(frozen=True)
class NativeConfig:
    """The sparse configuration, the pair that it follows, and the fields that were lost."""

    config: PreTrainedConfig
    pair: Pair
    lost: dict[str, Any] = field(default_factory=dict)


def refuse(model_type: str, reason: str) -> NoReturn:
    """Raise the `ValueError` for a model that has no exact native version."""
    raise ValueError(
        f"A model of type {model_type!r} cannot be upcycled into a native sparse class: {reason}. "
        f"Allowed: {', '.join(sorted({*TEXT_PAIRS, *WHOLE_PAIRS, *CONTAINERS}))}. For other models "
        'and other options there is target="vlmoe".'
    )


def native_config(dense: PreTrainedConfig, options: Upcycling) -> NativeConfig:
    """Return the sparse configuration for a dense one.

    Raises:
        ValueError: there is no exact version, or it does not have what the options ask for.
    """
    kind = dense.model_type
    if kind in TEXT_PAIRS:
        return _text(dense, options)
    if kind not in WHOLE_PAIRS and kind not in CONTAINERS:
        refuse(kind, _reason(dense))
    text = _text(dense.text_config, options)
    config_class = CONFIG_MAPPING[WHOLE_PAIRS.get(kind, kind)]
    values = _values(dense)
    if kind in WHOLE_PAIRS:  # the parts' types are the new class's
        for name in set(config_class.sub_configs) & set(values):
            values[name] = {k: v for k, v in values[name].items() if k not in BOOKKEEPING}
    config = config_class(**values | {"text_config": text.config.to_dict()})
    return NativeConfig(config, text.pair, text.lost)


def _reason(dense: PreTrainedConfig) -> str:
    if dense.model_type in REFUSED:
        return REFUSED[dense.model_type]
    if any(hasattr(dense.get_text_config(), name) for name in ("num_experts", "num_local_experts")):
        return "it has experts already"
    return "no exact conversion is known"


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in BOOKKEEPING}


def _text(dense: PreTrainedConfig, options: Upcycling) -> NativeConfig:
    if dense.model_type not in TEXT_PAIRS:
        refuse(dense.model_type, _reason(dense))
    if getattr(dense, "enable_moe_block", False):
        refuse(dense.model_type, "it has experts already")
    pair = _chosen(dense.model_type, options)
    config_class = CONFIG_MAPPING[pair.sparse]
    known, declared = set(config_class().to_dict()), set(type(dense)().to_dict())
    _require_same_rotation(dense, pair)
    values: dict[str, Any] = dict(pair.fields)
    lost: dict[str, Any] = {}
    for name, value in _values(dense).items():
        if name in known and name in declared | set(TOKENS):
            values[name] = value
        elif name in pair.also:
            values |= {} if value is None else {name: value}
        elif name in declared:
            _require_neutral(dense, pair, name, value)
            lost |= {} if name == "intermediate_size" else {name: value}
        elif name not in known:  # read by neither class
            values[name] = value
    if "layer_types" not in known and _attends(dense) == {"full_attention"}:
        values |= {"sliding_window": None} if "sliding_window" in known else {}
    if pair.partial_rotary and pair.sparse != dense.model_type:  # whose class may rotate a part
        rope = {"partial_rotary_factor": 1.0} | values["rope_parameters"]
        values["rope_parameters"] = rope
    if "rope_theta" in known:  # Cohere2-MoE keeps it beside `rope_parameters`, for other readers
        values["rope_theta"] = dense.rope_parameters["rope_theta"]
    values |= native_sizes(dense, pair, options) | _router_fields(options, pair, known)
    return NativeConfig(config_class(**values), pair, lost)


def _chosen(kind: str, options: Upcycling) -> Pair:
    """Return the pair that the options ask for, by default the first."""
    pairs = TEXT_PAIRS[kind]
    if options.sparse_type is None:
        return pairs[0]
    for pair in pairs:
        if pair.sparse == options.sparse_type:
            return pair
    raise ValueError(
        f"`sparse_type` is {options.sparse_type!r}; allowed for a model of type {kind!r}: "
        f"{', '.join(pair.sparse for pair in pairs)}."
    )


def _router_fields(options: Upcycling, pair: Pair, known: set[str]) -> dict[str, Any]:
    allowed = [name for name in ROUTER_FIELDS if name in known]
    for name in options.fields:
        if name not in allowed:
            raise ValueError(
                f"`fields` holds {name!r}; the native class {pair.sparse!r} allows: "
                f'{", ".join(allowed) or "none"}. Other fields need target="vlmoe".'
            )
    return dict(options.fields)


def _attends(dense: PreTrainedConfig) -> set[str]:
    """Return the kinds of the dense model's layers; empty where its class has one kind."""
    return set(getattr(dense, "layer_types", None) or ())


def _require_same_rotation(dense: PreTrainedConfig, pair: Pair) -> None:
    """Require that the sparse class reads all of the dense `rope_parameters`."""
    rope = dense.rope_parameters or {}
    if pair.sparse == dense.model_type:
        return
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not pair.partial_rotary:
        refuse(dense.model_type, "it rotates a part of each head, which the sparse class does not")
    if rope.get("llama_4_scaling_beta"):
        usual = rope.get("original_max_position_embeddings", 0)
        if dense.max_position_embeddings > usual:
            refuse(
                dense.model_type,
                f"it scales queries beyond position {usual} (`llama_4_scaling_beta`), which the "
                "sparse class does not",
            )
    if rope.get("rope_type") == "longrope":
        refuse(dense.model_type, "its rotary table changes with the length of the text (longrope)")
    ignored = ("max_position_embeddings", "llama_4_scaling_beta", "type")
    known = {*RopeParameters.__annotations__, *ignored} - {"mrope_section"} | set(pair.rope_keys)
    if unknown := sorted(set(rope) - known):
        refuse(
            dense.model_type,
            f"its `rope_parameters` have {', '.join(unknown)}, which the sparse class lacks",
        )


def _always(config: PreTrainedConfig, value: Any) -> bool:
    return True


def _is_off(config: PreTrainedConfig, value: Any) -> bool:
    return not value


NEUTRAL: dict[str, Callable[[PreTrainedConfig, Any], bool]] = {
    "attention_bias": _is_off,
    "mlp_bias": _is_off,
    "no_rope_layers": lambda config, value: all(value or ()),
    "sliding_window": lambda config, value: not value or _attends(config) == {"full_attention"},
    **dict.fromkeys(
        (
            "intermediate_size",  # the width of the experts
            "use_sliding_window",  # `layer_types` decides
            "max_window_layers",
            "no_rope_layer_interval",  # `no_rope_layers` decides
            "full_attn_idxs",  # `layer_types` decides
            "block_auto_adjust_ff_dim",  # the width of the experts is that of the dense MLP
            "block_ffn_dim_multiplier",
            "block_multiple_of",
            "original_max_position_embeddings",  # of longrope, which is refused
            "pretraining_tp",
            "resid_pdrop",  # dropout, in training alone
            "embd_pdrop",
        ),
        _always,
    ),
}
"""Whether a field that the sparse class does not know is without effect on the function."""


def _require_neutral(dense: PreTrainedConfig, pair: Pair, name: str, value: Any) -> None:
    if name == "layer_types":
        kinds = _attends(dense)
        one_window = (
            kinds == {"sliding_attention"}
            and "sliding_window" in CONFIG_MAPPING[pair.sparse]().to_dict()
        )
        is_neutral = kinds <= {"full_attention"} or one_window
    else:
        is_neutral = name in NEUTRAL and NEUTRAL[name](dense, value)
    if not is_neutral:
        refuse(dense.model_type, f"its `{name}` is {value!r}, which {pair.sparse!r} does not have")
