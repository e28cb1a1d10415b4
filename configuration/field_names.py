# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Refuse fields that a config does not have, if the name is another one for a field of ours.

transformers keeps unknown fields, as a config may come from another version of a library; a
misspelled field would silently do nothing. So a name close to a field of ours, another family's
name for it, or a field set one level too high is an error that names ours. Other names stay
allowed.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassFieldValidationError,
)
from transformers import GenerationConfig, PreTrainedConfig

CLOSE = 0.85  # of difflib: "n_groups" to "n_group" is 0.93, "sep_token_id" to "pad_token_id" 0.83
# Fields of the text config that nobody writes into a whole config for other reasons, as libraries
# do with `use_cache` or `pad_token_id`.
_ROUTING = re.compile("expert|router|moe|topk|group|scoring|routed|sparse|mlp_only")
_OTHER_NAMES = {  # of a field of ours, in other families
    "num_experts": "n_routed_experts num_routed_experts moe_num_experts n_experts",
    "num_experts_per_tok": "top_k topk moe_top_k moe_topk moe_k num_selected_experts "
    "num_experts_per_token experts_per_token n_experts_per_tok num_activated_experts",
    "moe_intermediate_size": "expert_intermediate_size moe_ffn_hidden_size expert_hidden_size "
    "expert_ffn_dim",
    "num_shared_experts": "n_shared_experts moe_num_shared_experts shared_expert_intermediate_size",
    "router_aux_loss_coef": "aux_loss_coef aux_loss_alpha moe_aux_loss_coeff "
    "load_balancing_loss_coef",
    "router_z_loss_coef": "z_loss_coef moe_z_loss_coeff",
    "decoder_sparse_step": "moe_layer_freq",
    "image_token_id": "image_token_index",
    "pixel_shuffle_factor": "downsample_ratio scale_factor",
}
ALIASES = {other: ours for ours, others in _OTHER_NAMES.items() for other in others.split()}

Config = TypeVar("Config", bound=PreTrainedConfig)


def strict_fields(config_class: type[Config]) -> type[Config]:
    """Apply huggingface_hub's `strict`, with `ValueError`s that name field and value."""
    cls: Any = strict(config_class)
    set_field, validate = cls.__setattr__, cls.validate

    @functools.wraps(set_field)
    def checked_setattr(self: Config, name: str, value: object) -> None:
        name = type(self).attribute_map.get(name, name)
        try:
            set_field(self, name, value)
        except StrictDataclassFieldValidationError as error:
            allowed = {field.name: field.type for field in dataclasses.fields(self)}[name]
            raise ValueError(
                f"`{name}` is {value!r} ({type(value).__name__}); allowed: "
                f"{getattr(allowed, '__name__', allowed)}."
            ) from error

    @functools.wraps(validate)
    def checked_validate(self: Config) -> None:
        try:
            validate(self)
        except StrictDataclassClassValidationError as error:
            raise ValueError(str(error.__cause__)) from error

    cls.__setattr__, cls.validate = checked_setattr, checked_validate
    return cls


def refuse_unknown(config_class: type[PreTrainedConfig], names: Iterable[str]) -> None:
    """Refuse other names for a field of `config_class`, or of its text config (`ValueError`)."""
    known, below = _fields(config_class)
    for name in names:
        if name in known or name.startswith("_"):
            continue
        if name in below:
            if not _ROUTING.search(name):
                continue
            raise ValueError(
                f"`{name}` is a field of the text config: set it in `text_config`, as in "
                f"`text_config={{{name!r}: ...}}` or `config.text_config.{name} = ...`."
            )
        meant = ALIASES.get(name)
        if meant not in known and meant not in below:
            given = hasattr(PreTrainedConfig, name) or name in _generation_fields()
            ours = {*known, *below} - _fields(PreTrainedConfig)[0]
            close = [] if given else get_close_matches(name, ours, 1, CLOSE)
            meant = close[0] if close else None
        if meant is not None:
            where = "" if meant in known else ", in `text_config`"
            raise ValueError(f"There is no field `{name}`; it is called `{meant}`{where}.")


@functools.cache
def _fields(config_class: type[PreTrainedConfig]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the fields of a config with their aliases, and those of its text config."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    text = config_class.sub_configs.get("text_config")
    below = frozenset() if text is None else _fields(text)[0]
    return frozenset(fields | config_class.attribute_map.keys()), below - fields


@functools.cache
def _generation_fields() -> frozenset[str]:
    return frozenset(GenerationConfig._get_default_generation_params())
