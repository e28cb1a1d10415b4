# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The configuration of the native sparse model, from the dense model's.

The rule: every field that the sparse class knows is carried. A field that it does not know must be
neutral, that is without effect on the function, or the model is refused; it is then listed as lost.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .native_pairs import CONTAINERS, REFUSED, TEXT_PAIRS, WHOLE_PAIRS, Pair
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
    pair = _chosen(dense.model_type, options)
    config_class = CONFIG_MAPPING[pair.sparse]
    known = set(config_class().to_dict()) | set(pair.also)
    declared = set(type(dense)().to_dict())
    values, lost = {}, {}
    for name, value in _values(dense).items():
        if name in declared | set(TOKENS) and name in known and value is not None:
            values[name] = value
        elif name in declared and name in known:
            values |= {} if name in pair.also else {name: None}
        elif name in declared:
            _require_neutral(dense, name, value)
            lost[name] = value
        elif name not in known:  # read by neither class
            values[name] = value
    values = dict(pair.fields) | values | _sizes(dense, pair, options)
    for name, value in options.fields.items():
        if name not in ROUTER_FIELDS or name not in known:
            raise ValueError(
                f"`fields` holds {name!r}, which {config_class.__name__} does not have; allowed: "
                f'{", ".join(n for n in ROUTER_FIELDS if n in known)}. Others need target="vlmoe".'
            )
        values[name] = value
    return NativeConfig(config_class(**values), pair, lost)


def _chosen(kind: str, options: Upcycling) -> Pair:
    return TEXT_PAIRS[kind][0]


def _sizes(dense: PreTrainedConfig, pair: Pair, options: Upcycling) -> dict[str, Any]:
    """Return the sizes of the experts, and the layers that have them."""
    width, split = dense.intermediate_size, options.expert_split
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
    sizes = {
        pair.num_experts: options.num_experts * split,
        pair.top_k: options.num_experts_per_tok * split,
        pair.width: width // split,
    }
    return sizes | _layers(dense.num_hidden_layers, pair, options)


def _layers(count: int, pair: Pair, options: Upcycling) -> dict[str, Any]:
    sparse = options.sparse_layer_indices(count)
    dense = [i for i in range(count) if i not in sparse]
    if pair.sparse_layers == "mlp_only_layers":
        return {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    return {}


NEUTRAL: dict[str, Callable[[PreTrainedConfig, Any], bool]] = {
    "layer_types": lambda config, types: set(types or ()) <= {"full_attention"},
    "max_window_layers": lambda config, value: True,
}
"""Whether a field that the sparse class does not know is without effect on the function."""


def _require_neutral(dense: PreTrainedConfig, name: str, value: Any) -> None:
    if name not in NEUTRAL or not NEUTRAL[name](dense, value):
        refuse(dense.model_type, f"its `{name}` is {value!r}, which the sparse class does not have")
