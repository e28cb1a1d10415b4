# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Refuse, by name, texts and text options that the tokenizers library cannot take."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

LEAST = {"max_length": 1, "pad_to_multiple_of": 1, "stride": 0}
OPTION_GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs")


def require_characters(text: str, where: str) -> None:
    """Raise `ValueError` for half of a surrogate pair, which is no character; `where` names it."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: the text holds {text[error.start]!r} at position {error.start}, half of a "
            "surrogate pair and no character. Remove it, or replace it: "
            "text.encode(errors='replace').decode()."
        ) from error


def check_text_options(options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a wrong number or switch among the options of a processor's call."""
    given = dict(options)
    for group in OPTION_GROUPS:
        of_group = options.get(group)
        if of_group is not None and not isinstance(of_group, Mapping):
            raise ValueError(f"`{group}` is {of_group!r:.80}; allowed: a mapping of options.")
        if group != "images_kwargs":
            given |= of_group or {}
    for name, least in LEAST.items():
        value = given.get(name)
        is_number = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (is_number and value >= least):
            raise ValueError(
                f"`{name}` is {value!r:.80}; allowed: a whole number, {least} or more, or None."
            )
    switch = given.get("add_special_tokens")
    if switch is not None and not isinstance(switch, bool):
        raise ValueError(f"`add_special_tokens` is {switch!r:.80}; allowed: True or False.")
