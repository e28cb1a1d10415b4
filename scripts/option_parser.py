# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Parsers made from the dataclasses of options, and the YAML files that options may come from.

Nothing here imports more than the standard library (PyYAML only where a config file is read), so
that help is fast.
"""

import argparse
import dataclasses
import difflib
import json
import types
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from .options import PATHS, with_home


class OptionParser(argparse.ArgumentParser):
    """An argparse parser whose errors are `ValueError`, and that takes no abbreviated options."""

    def __init__(self, **arguments: Any):
        arguments.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, add_help=False, **arguments)
        self.add_argument("-h", "--help", action="help", help="Show this text.")

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting, so that every wrong input ends in the same way."""
        raise ValueError(f"{message.rstrip('.')}. See `{self.prog} --help`.")


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add a group of options to `parser`, one for each field of the dataclass `options`.

    Booleans take `--name`, `--name true` or `--name false`, as those of transformers do.
    """
    group = parser.add_argument_group(options._argument_group_name)  # type: ignore[attr-defined]
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        arguments = dict(field.metadata)
        kind = _value_type(hints[field.name])
        if field.default is not None:
            default = str(field.default).lower() if kind is bool else field.default
            arguments["help"] += f" (default: {default})"
        if kind is bool:
            arguments |= {"type": _parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
        else:
            metavar = {int: "N", float: "X"}.get(kind, field.name.upper())
            arguments |= {"type": kind, "metavar": metavar}
        arguments["help"] = arguments["help"].replace("%", "%%")
        group.add_argument(f"--{field.name}", default=field.default, **arguments)


def parse_options(
    parser: argparse.ArgumentParser, argv: list[str], option_classes: list[type]
) -> tuple[Any, ...]:
    """Parse `argv` (and the `--config` file it may name) into one object of each class.

    Arguments of the parser beyond those classes' come last, as a namespace. Flags win over the
    file.

    Raises:
        ValueError: an argument belongs to no option or has a wrong value.
    """
    config, rest = split_config(argv, option_classes)
    parser.set_defaults(**as_defaults(config))
    namespace, unknown = parser.parse_known_args(rest)
    if unknown:
        raise unknown_argument(unknown, option_names(option_classes))
    values = vars(namespace)
    return (
        *(
            options(**{field.name: values.pop(field.name) for field in dataclasses.fields(options)})
            for options in option_classes
        ),
        namespace,
    )


def command_options(
    argv: list[str],
    option_classes: list[type],
    *,
    usage: str,
    description: str,
    epilog: str,
    argument: tuple[str, str] | None = None,
    argument_required: bool = True,
) -> tuple[Any, ...] | None:
    """Options of a command as `parse_options` gives them, or None after printing its --help.

    Args:
        argv: arguments after the command's name.
        option_classes: dataclasses of its options.
        usage: how it is called, beginning with `vlmoe COMMAND`.
        description: what it does, in a sentence.
        epilog: examples.
        argument: name and help text of the one argument without a flag.
        argument_required: whether it must be given.

    Raises:
        ValueError: as `parse_options`, or the argument is missing.
    """
    parser = OptionParser(
        prog=" ".join(usage.split()[:2]), usage=usage, description=description, epilog=epilog
    )
    if argument:
        parser.add_argument(argument[0], nargs="?", help=argument[1])
    parser.add_argument("--config", metavar="FILE", help="A YAML file of options; flags win.")
    for options in option_classes:
        add_options(parser, options)
    if {"-h", "--help"} & set(argv):
        print(parser.format_help())
        return None
    parsed = parse_options(parser, argv, option_classes)
    if argument and argument_required and not getattr(parsed[-1], argument[0]):
        raise ValueError(f"The {argument[0]} is missing: {usage}.")
    if argument and argument[0] in (*PATHS, "folder"):
        setattr(parsed[-1], argument[0], with_home(getattr(parsed[-1], argument[0])))
    return parsed


def json_object(text: str | None, option: str) -> dict[str, Any]:
    """The JSON object that an option's text holds; empty without a text.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    try:
        given = json.loads(text, parse_constant=_refuse_constant) if text else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--{option} is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"--{option} must be a JSON object of fields; got {text}.")
    return given


def as_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Values of a config file as defaults of a parser: numbers as text, which argparse checks."""
    return {
        key: str(value)
        if isinstance(value, (int, float)) and value is not True and value is not False
        else value
        for key, value in config.items()
    }


def option_names(option_classes: list[type]) -> list[str]:
    """The names of all options of the dataclasses."""
    return [
        field.name
        for options in option_classes
        for field in dataclasses.fields(options)
        if field.init
    ]


def read_config(path: str | Path, option_classes: list[type]) -> dict[str, Any]:
    """Read options from a YAML file: one mapping of option names to values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a mapping, or it holds an option that none of `option_classes` has.
    """
    import yaml

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must be a mapping of options to values; it is a {type(values).__name__}."
        )
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    known = option_names(option_classes)
    for key in values:
        if key not in known:
            raise ValueError(f"{path}: there is no option {key!r}{close_matches(key, known)}.")
        if values[key] is False and key.endswith("_strategy"):
            values[key] = "no"  # YAML reads a bare `no` as false
    if isinstance(values.get("model_overrides"), dict):
        values["model_overrides"] = json.dumps(values["model_overrides"], default=str)
    _require_types(values, option_classes, path)
    return values


def _require_types(values: dict[str, Any], option_classes: list[type], path: Path) -> None:
    """Refuse values that no option of ours takes; `TrainingArguments` checks its own.

    Raises:
        ValueError: names the file, the option and the value.
    """
    for options in option_classes:
        if not hasattr(options, "_argument_group_name"):
            continue
        hints = get_type_hints(options)
        for field in dataclasses.fields(options):
            value = values.get(field.name)
            is_list = "list" in str(hints[field.name])
            wanted = list if is_list else (str, int, float, bool)
            fits = isinstance(value, wanted) and (
                not isinstance(value, bool) or _value_type(hints[field.name]) is bool
            )
            if value is not None and not fits:
                raise ValueError(f"{path}: --{field.name} cannot be {value!r}.")


def split_config(argv: list[str], option_classes: list[type]) -> tuple[dict[str, Any], list[str]]:
    """Take `--config FILE` out of `argv`: its options, and the other arguments.

    `--max-length` becomes `--max_length`.
    """
    finder = OptionParser(prog="vlmoe")
    finder.add_argument("--config")
    found, others = finder.parse_known_args([_with_underscores(each) for each in argv])
    return ({} if found.config is None else read_config(found.config, option_classes)), others


def _with_underscores(argument: str) -> str:
    name, equals, value = argument.partition("=")
    is_flag = name.startswith("--") and " " not in name
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if is_flag else argument


def unknown_argument(arguments: list[str], known: list[str]) -> ValueError:
    """The error for arguments that no option takes, with close matches for the first."""
    name = arguments[0].split("=")[0].lstrip("-").replace("-", "_")
    if not arguments[0].startswith("-"):
        return ValueError(f"The argument {arguments[0]!r} belongs to no option.")
    return ValueError(f"There is no option {arguments[0]!r}{close_matches(name, known, '--')}.")


def close_matches(name: str, known: list[str], prefix: str = "") -> str:
    """` (did you mean a, b?)`, or nothing."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" (did you mean {', '.join(prefix + match for match in close)}?)" if close else ""


def require(value: str | None, name: str, command: str) -> str:
    """`value`, if it was given.

    Raises:
        ValueError: it was not; the message names the option.
    """
    if not value:
        raise ValueError(f"--{name} is missing. See `vlmoe {command} --help`.")
    return value


def _value_type(hint: Any) -> Any:
    """The type of one value: `int | None` -> int, `list[str] | None` -> str."""
    if get_origin(hint) is types.UnionType:
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return get_args(hint)[0] if get_origin(hint) is list else hint


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _parse_bool(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]
