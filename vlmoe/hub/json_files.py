# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Read JSON files of users within limits, with errors that name the file; write JSON without NaN.

Browsers and other languages cannot read NaN.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from .input_errors import InputError

JsonObject = dict[str, Any]

MAX_JSON_DEPTH = 100
MAX_JSON_BYTES = 1 << 28  # tokenizer.json, the largest of a model, has some 30 MB

_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def read_json(path: str | Path, kind: type | tuple[type, ...] = dict, finite: bool = True) -> Any:
    """Read a JSON file whose top level is of `kind`.

    Args:
        path: a file in UTF-8, with or without a byte order mark.
        kind: type of the top level: dict, list, ...
        finite: refuse NaN and Infinity, which Python writes though JSON has neither.

    Raises:
        InputError: the file cannot be read, is too large, no JSON, nested too deep, or its top
            level is of another kind; the message names the file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InputError(f"{path}: has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read.")
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be read ({reason}).") from error
    return parse_json(content, str(path), kind, finite)


def parse_json(
    content: str | bytes, what: str, kind: type | tuple[type, ...] = dict, finite: bool = True
) -> Any:
    """Parse JSON that came from `what`, under the rules of `read_json`; raises as it does."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        if finite:
            value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_number)
        else:
            value = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{what}: not valid JSON (not UTF-8: {error.reason}).") from error
    except RecursionError as error:
        raise _too_deep(what) from error
    except ValueError as error:
        raise InputError(f"{what}: not valid JSON ({error}).") from error
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise _too_deep(what)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        wanted = " or ".join(_KINDS[each] for each in kinds)
        raise InputError(f"{what}: must hold {wanted}; it holds {_KINDS[type(value)]}.")
    return value


def json_text(value: object, what: str, indent: int | None = None) -> str:
    """Return `value` as JSON for `what`.

    Raises:
        ValueError: it holds a number that is NaN or infinite; the message names its place.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        place = next(_not_finite(value), None)
        if place is None:
            raise
        raise ValueError(f"{what}: {place}, which is no number; nothing is written.") from error


def _not_finite(value: object, place: str = "") -> Iterator[str]:
    """Yield `a.b[2] is nan` for each such number."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place.lstrip('.') or 'the value'} is {value}"
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _not_finite(part, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from _not_finite(part, f"{place}[{number}]")


def _is_deeper(value: Any, limit: int) -> bool:
    """Tell whether lists and objects are nested deeper than `limit`, level by level."""
    level = [value]
    for _ in range(limit + 1):
        level = [each for each in level if isinstance(each, (dict, list))]
        if not level:
            return False
        level = [
            part for each in level for part in (each.values() if isinstance(each, dict) else each)
        ]
    return True


def _too_deep(what: str) -> InputError:
    return InputError(f"{what}: nested too deep; JSON is read to a depth of {MAX_JSON_DEPTH}.")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite_number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large for a number")
    return number
