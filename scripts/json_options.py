# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Options that hold fields of a config: as one JSON object, or one by one.

    --model_overrides '{"text_config": {"num_experts": 4}}'
    --model.text_config.num_experts 4

A single field's value is read as JSON, and as text where it is none.
"""

import json
from typing import Any, NoReturn

from .shared_options import place

Fields = dict[str, Any]


def json_object(text: str | Fields) -> Fields:
    """Return the JSON object in a text; a mapping from a config file is one already.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    try:
        given = _parsed(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError("a JSON object of fields is needed")
    return given


def sources(given: str | list[Fields]) -> str | list[Fields]:
    """Return the name of a dataset, or the list of sources in a text or from a config file.

    Raises:
        ValueError: the text is empty, or begins as a list and is no JSON.
    """
    if not isinstance(given, str) or not given.lstrip().startswith("["):
        return place(given) if isinstance(given, str) else given
    try:
        found: list[Fields] = _parsed(given)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    return found


def split_dotted(
    arguments: list[str], prefixes: dict[str, str]
) -> tuple[dict[str, Fields], list[str]]:
    """Take fields such as `--model.text_config.num_experts 4` out of the arguments.

    Args:
        arguments: of a command.
        prefixes: names of options by what stands before the first dot.

    Returns:
        Fields by the name of their option, nested as in the config, and the other arguments.

    Raises:
        ValueError: a field has no value, or is given beside a field inside it.
    """
    fields: dict[str, Fields] = {}
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        prefix, *path = name.removeprefix("--").split(".")
        if argument == "--":
            return fields, [*others, argument, *rest]
        if not (name.startswith("--") and path and prefix in prefixes):
            others.append(argument)
            continue
        if not equals and not rest:
            raise ValueError(f"{name} needs a value.")
        tree = fields.setdefault(prefixes[prefix], {})
        for key in path[:-1]:
            tree = tree.setdefault(key, {})
            if not isinstance(tree, dict):
                raise ValueError(f"{name}: {key} has a value of its own already.")
        tree[path[-1]] = _value(value if equals else rest.pop(0))
    return fields, others


def _value(text: str) -> Any:
    try:
        return _parsed(text)
    except (ValueError, RecursionError):
        return text


def _parsed(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
