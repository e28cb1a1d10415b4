# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The named sizes of `configuration/presets/`, as fields of a `VLMoEConfig`."""

from collections.abc import Mapping

from ..configuration.configuration_vlmoe import PRESETS
from ..configuration.configuration_vlmoe_text import Fields
from .json_files import read_json


def preset_names() -> list[str]:
    """Return the names of the presets, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def preset_fields(name: str, overrides: Mapping[str, object]) -> Fields:
    """Return the fields of a preset, for the arguments and errors of `VLMoEConfig.from_preset`."""
    names = preset_names()
    if name not in names:
        raise ValueError(f"There is no preset {name!r}; allowed: {', '.join(names)}.")
    fields = read_json(PRESETS / f"{name}.json")
    for field, value in overrides.items():
        own = fields.get(field)
        if isinstance(value, dict) and isinstance(own, dict):
            kind = value.get("model_type")
            value = own | value if kind in (None, own.get("model_type", kind)) else value
        fields[field] = value
    return fields
