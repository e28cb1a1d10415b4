# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Options from a YAML file: one mapping of option names to values; flags win over it."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

MORE_OPTIONS = "more options of the config file"
PATH = "path of the config file"
SOURCES = "DATA"
"""The metavar of options that also take a list of mappings."""
Values = dict[str, Any]


def _load(ctx: typer.Context, path: str | None) -> None:
    """Make the file's values the defaults of the command's options.

    A command that takes options beyond its own finds their values in `ctx.meta[MORE_OPTIONS]`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a mapping, or holds an unknown option or a value that no option takes.
    """
    if path is None:
        return
    ctx.meta[PATH] = path
    options = {
        param.name: param
        for param in ctx.command.params
        if param.param_type_name == "option" and param.expose_value
    }
    values = read_config(path)
    more = {name: value for name, value in values.items() if name not in options}
    if more and not ctx.allow_extra_args:
        name = next(iter(more))
        raise ValueError(f"{path}: there is no option {name!r}{close_matches(name, options)}.")
    ctx.meta[MORE_OPTIONS] = more
    ctx.default_map = {}
    for name, param in options.items():
        if values.get(name) is not None:
            ctx.default_map[name] = _text(values[name], param, path)


def _text(value: Any, param: Any, path: str) -> Any:
    """Return a value of the file as it would be on the command line."""
    if param.metavar == "JSON":
        allowed: tuple[type, ...] = (dict, str)
    elif param.metavar == SOURCES:
        allowed = (list, str)
    elif param.multiple:
        allowed = (list,)
    else:
        allowed = (bool, str) if param.is_flag else (int, float, str)
    if type(value) not in allowed:
        raise ValueError(f"{path}: --{param.name} cannot be {value!r}.")
    return str(value) if type(value) in (int, float) else value


def read_config(path: str | Path) -> Values:
    """Read a YAML file: one mapping of option names to values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, or not a mapping.
    """
    import yaml

    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must be a mapping of options to values; it is a {type(values).__name__}."
        )
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def close_matches(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ` (did you mean a, b?)`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" (did you mean {', '.join(prefix + match for match in close)}?)" if close else ""


ConfigFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="A YAML file of options; those on the command line win.",
        callback=_load,
        is_eager=True,
        expose_value=False,
    ),
]
