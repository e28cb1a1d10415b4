# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The options of `vlmoe train` that are fields of `transformers.TrainingArguments`.

They are read from the arguments that the command does not declare and from its config file. The
functions import transformers; importing this module does not.
"""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from .commands import OTHER_NAMES
from .config_file import MORE_OPTIONS, PATH, close_matches

if TYPE_CHECKING:
    from transformers import HfArgumentParser


def given_arguments(ctx: typer.Context) -> dict[str, Any]:
    """Return the training arguments that the command line or the config file gives; flags win.

    Raises:
        ValueError: an option does not exist or has a wrong value.
    """
    from vlmoe.training.argument_ranges import require_in_range

    parser, names = training_parser()
    ctx.meta[OTHER_NAMES] = names
    known = [*names, *(param.name for param in ctx.command.params)]
    in_file = dict(ctx.meta.get(MORE_OPTIONS, {}))
    for name, value in in_file.items():
        if name not in names:
            matches = close_matches(name, known)
            raise ValueError(f"{ctx.meta[PATH]}: there is no option {name!r}{matches}.")
        if value is False and name.endswith("_strategy"):
            in_file[name] = "no"  # YAML reads a bare `no` as false
        elif type(value) in (int, float):
            in_file[name] = str(value)  # which the parser converts and checks
    parser.set_defaults(**(dict.fromkeys(names) | in_file))
    namespace, unknown = parser.parse_known_args(ctx.args)
    if unknown:
        raise ValueError(_unknown(unknown[0], known))
    values = vars(namespace).items()
    given = {name: value for name, value in values if value is not None or name in in_file}
    for name, value in given.items():
        require_in_range(name, value)
    return given


def training_parser() -> tuple["HfArgumentParser", list[str]]:
    """Return a parser for the fields of `TrainingArguments`, and their names."""
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        """Raises what argparse prints, and takes a word where a field may hold one."""

        def add_argument(self, *names: Any, **arguments: Any) -> argparse.Action:
            if "--include_num_input_tokens_seen" in names:  # declared a bool, may be a word
                arguments["type"] = _bool_or_word
            return super().add_argument(*names, **arguments)

        def error(self, message: str) -> NoReturn:
            raise ValueError(f"{message.rstrip('.')}. See `vlmoe train --help-all`.")

    parser = Parser(
        TrainingArguments,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    return parser, [field.name for field in dataclasses.fields(TrainingArguments) if field.init]


def print_all_help(ctx: typer.Context, wanted: bool) -> None:
    """Print the help of the command, and that of all training arguments with our defaults."""
    if not wanted:
        return
    from vlmoe.training.arguments import training_defaults

    parser, _ = training_parser()
    parser.set_defaults(**training_defaults())
    print(f"{ctx.get_help()}\n\n{parser.format_help()}")
    raise typer.Exit


def _unknown(argument: str, known: list[str]) -> str:
    if not argument.startswith("-"):
        return f"The argument {argument!r} belongs to no option."
    name = argument.partition("=")[0].lstrip("-").replace("-", "_")
    return f"There is no option {argument!r}{close_matches(name, known, '--')}."


def _bool_or_word(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)
