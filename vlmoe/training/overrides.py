# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Fields of a config that are replaced by name, at any depth; unknown ones are refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from ..data.row_fields import did_you_mean

Fields = Mapping[str, Any]
"""Fields of a config by name, those of a config inside as a mapping."""

_ARGUMENT = "`model_overrides`"


def require_known(config: PreTrainedConfig, overrides: Fields, path: str = "") -> None:
    """Refuse a field that the config, or a config inside it, does not have.

    Args:
        config: what is overridden.
        overrides: values by field, those of a config inside as a dict.
        path: where in the whole config we are, such as `vision_config.`.

    Raises:
        ValueError: names the field and those that are close.
    """
    known = _field_names(config)
    for name, value in overrides.items():
        if name not in known:
            matches = did_you_mean(name, sorted(known))
            raise ValueError(f"{_ARGUMENT}: the config has no field {path + name!r}{matches}.")
        inner = getattr(config, name, None)
        if not isinstance(value, dict):
            continue
        if isinstance(inner, PreTrainedConfig):
            other = value.get("model_type", inner.model_type)
            is_other = isinstance(other, str) and other != inner.model_type
            inner = AutoConfig.for_model(other) if is_other else inner
            require_known(inner, value, f"{path}{name}.")
        elif name == "rope_parameters":
            _require_rope(value, f"{path}{name}.")


def replace_fields(config: PreTrainedConfig, overrides: Fields) -> None:
    """Set fields of a loaded config, nested ones by nested dicts.

    Raises:
        ValueError: the config has no such field, or the value does not fit.
    """
    require_known(config, overrides)
    _set(config, overrides)


def merged(base: Fields, over: Fields) -> dict[str, Any]:
    """Return `base` with the values of `over`, nested dicts merged."""
    result = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def _set(config: PreTrainedConfig, overrides: Fields) -> None:
    for name, value in overrides.items():
        inner = getattr(config, name, None)
        if isinstance(value, dict) and isinstance(inner, PreTrainedConfig):
            _set(inner, value)
        else:
            if isinstance(value, dict) and isinstance(inner, dict):
                value = merged(inner, value)
            setattr(config, name, value)
    if hasattr(config, "validate_architecture"):
        config.validate_architecture()


def _field_names(config: PreTrainedConfig) -> set[str]:
    """Return the fields of the config's class, their aliases, and further ones of a saved file."""
    declared = {field.name for field in dataclasses.fields(config) if field.init}
    return {*config.to_dict(), *declared, *config.attribute_map}


def _require_rope(given: Fields, path: str) -> None:
    known = sorted(RopeParameters.__annotations__)
    for name in given:
        if name not in known:
            matches = did_you_mean(name, known)
            raise ValueError(f"{_ARGUMENT}: the config has no field {path + name!r}{matches}.")
