# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Commands made from annotated functions by typer, with the conventions that they share.

    def main(model: SavedModel, max_rows: Rows = None, config: ConfigFile = None) -> None: ...
    run("evaluate", main)

- `--max_length` and `--max-length` are one option; a flag takes `--lora` and `--lora true|false`.
- `--config FILE` reads options from a YAML file; those on the command line win.
- A JSON option also takes single fields: `--model.text_config.num_experts 4`.
- Help is plain text, grouped by `rich_help_panel`, and imports neither torch nor transformers.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from .command_line import run_command
from .config_file import PATH
from .json_options import split_dotted

OTHER_NAMES = "names of options that the command does not declare"
Context = Any  # the class that typer passes is private
_METAVARS = {int: "N", float: "X", bool: "true|false"}
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


class Command(TyperCommand):
    """A command with the conventions of this module."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        params: list[Any] = self.params  # options or arguments of typer, which have more attributes
        for param in params:
            param.opts = [_underscored(name) for name in param.opts]
            param.secondary_opts = [_underscored(name) for name in param.secondary_opts]
            kind = param.type_descriptor.annotation
            if kind is bool:
                param.show_default = param.default is True
            if not (param.metavar or param.type_descriptor.is_choice):
                param.metavar = _METAVARS.get(kind, param.name.upper())

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Parse the arguments, with `--flag true` and dotted fields in the forms of typer."""
        json_options = {
            param.name.removesuffix("_overrides"): param.name
            for param in self.params
            if param.metavar == "JSON"
        }
        fields, args = split_dotted(args, json_options)
        rest = super().parse_args(ctx, self._plain(args))
        if fields:
            from vlmoe.training.overrides import merged

            for name, values in fields.items():
                ctx.params[name] = merged(ctx.params[name] or {}, values)
        return rest

    def format_help_text(self, ctx: Context, formatter: Any) -> None:
        """Write the docstring with its own line breaks."""
        formatter.write(f"\n{self.help}\n")

    def format_options(self, ctx: Context, formatter: Any) -> None:
        """Write the options in groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                panel = getattr(param, "rich_help_panel", None)
                title = panel or f"{param.param_type_name.capitalize()}s"
                name = record[0].partition(" / --no_")[0]
                groups.setdefault(title, []).append((name, record[1]))
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def _plain(self, args: list[str]) -> list[str]:
        """Return the arguments with `--max-rows` as `--max_rows`, `--lora false` as `--no_lora`."""
        flags = {
            name: param
            for param in self.params
            if getattr(param, "is_flag", False)
            for name in param.opts
        }
        plain: list[str] = []
        rest = list(args)
        while rest:
            argument = rest.pop(0)
            if argument == "--":
                return [*plain, argument, *rest]
            name, equals, value = argument.partition("=")
            name = _underscored(name)
            param = flags.get(name)
            if param is None:
                plain.append(f"{name}{equals}{value}")
                continue
            if not equals and rest and rest[0].lower() in (*_TRUE, *_FALSE):
                value = rest.pop(0)
            elif equals and value.lower() not in (*_TRUE, *_FALSE):
                raise ValueError(f"{name} takes true or false, got {value!r}.")
            plain.append(param.secondary_opts[0] if value.lower() in _FALSE else param.opts[0])
        return plain


SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}


def command(function: Callable[..., None]) -> Command:
    """Return the command that calls an annotated function; its docstring is the help text.

    A function that takes `ctx: typer.Context` finds options that it does not declare in `ctx.args`.
    """
    takes_more = "ctx" in inspect.signature(function).parameters
    more = {"allow_extra_args": takes_more, "ignore_unknown_options": takes_more}
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(cls=Command, context_settings=SETTINGS | more)(function)
    made = typer.main.get_command(app)
    assert isinstance(made, Command)
    return made


def call(made: Command, name: str, argv: list[str]) -> None:
    """Parse the arguments and run the command, or print its help.

    Raises:
        ValueError: an option is unknown, missing or has a wrong value; what the command raises.
    """
    try:
        with made.make_context(name, list(argv)) as ctx:
            try:
                made.invoke(ctx)
            except ValueError as error:
                raise ValueError(as_options(str(error), ctx)) from error
    except typer.Exit:
        pass  # after --help
    except typer.TyperException as error:
        raise ValueError(_explained(error)) from error


def run(name: str, function: Callable[..., None], argv: list[str] | None = None) -> int:
    """Run the function as `vlmoe NAME` and return the exit code."""
    title = f"vlmoe {name}"
    return run_command(title, lambda arguments: call(command(function), title, arguments), argv)


def _explained(error: typer.TyperException) -> str:
    """Return the message of an error with the value, and the file that it comes from."""
    message = (
        error.format_message()
        .replace("Value error, ", "")
        .replace("Input should be", "must be")
        .rstrip(".")
    )
    ctx: Context = getattr(error, "ctx", None)
    if ctx is None:
        return message
    details: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    given = f", got {details[0]['input']!r}" if details else ""
    param = getattr(error, "param", None)
    source = ctx.get_parameter_source(param.name) if param else None
    file = f"{ctx.meta[PATH]}: " if source and source.name == "DEFAULT_MAP" else ""
    return f"{file}{message}{given}. See `{ctx.command_path} --help`."


def as_options(message: str, ctx: Context) -> str:
    """Return the message with arguments of functions (`dtype`) spelled as options (--dtype)."""
    names = {param.name for param in ctx.command.params} | set(ctx.meta.get(OTHER_NAMES, ()))
    return re.sub(r"`(\w+)`", lambda m: f"--{m[1]}" if m[1] in names else m[0], message)


def _underscored(name: str) -> str:
    return f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
