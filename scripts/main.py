# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The console command `vlmoe`.

    vlmoe --help
    vlmoe train --help

Each subcommand is the annotated function `main` of a module of this package. The modules import
torch and transformers only when there is work to do, so that help is fast.
"""

import sys
from collections.abc import Callable
from importlib import import_module

from .command_line import EXIT_ERROR
from .commands import run
from .config_file import close_matches

MODULES = {
    "data": "data",
    "train": "train",
    "evaluate": "evaluate",
    "generate": "generate",
    "inspect": "inspect_experts",
    "card": "card",
    "upcycle": "upcycle",
    "compress": "compress",
    "prune": "prune",
    "export": "export",
    "merge": "merge",
    "export-lora": "export_lora",
    "push": "push_to_hub",
    "demo": "demo",
}

EXAMPLES = """\
examples:
  vlmoe data my_data
  vlmoe train --model tiny --dataset easy_vqa --eval_split test --output_dir outputs/tiny
  vlmoe evaluate --model outputs/tiny --dataset easy_vqa --split test --batch_size 256
  vlmoe generate --model outputs/tiny --image picture.png "What shape does the image contain?"
  vlmoe inspect --model outputs/tiny --dataset easy_vqa --output_dir outputs/inspect
  vlmoe upcycle user/dense --output_dir outputs/sparse
  vlmoe compress outputs/tiny --dataset easy_vqa --keep 0.25 --output_dir outputs/small
  vlmoe push outputs/tiny --repo_id user/tiny-vlmoe

`vlmoe COMMAND --help` lists the options of a command; --traceback shows an error's origin."""


def main(argv: list[str] | None = None) -> int:
    """Run `vlmoe COMMAND ...` and return its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in MODULES:
        return run(name, command_function(name), rest)
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        from importlib.metadata import version

        print(f"vlmoe {version('vlmoe')}")
        return 0
    matches = close_matches(name, MODULES)
    print(
        f"vlmoe: error: there is no command {name!r}{matches}. See `vlmoe --help`.",
        file=sys.stderr,
    )
    return EXIT_ERROR


def command_function(name: str) -> Callable[..., None]:
    """Return the function of a command; only its module is imported."""
    function: Callable[..., None] = import_module(f".{MODULES[name]}", __package__).main
    return function


def usage() -> str:
    """Return the text of `vlmoe --help`: the first line of each command's docstring."""
    summaries = {
        name: (command_function(name).__doc__ or "").partition("\n")[0] for name in MODULES
    }
    table = "\n".join(f"  {name:<12} {summary}" for name, summary in summaries.items())
    return f"Usage: vlmoe COMMAND [OPTIONS]\n\nCommands:\n{table}\n\n{EXAMPLES}"


if __name__ == "__main__":
    sys.exit(main())
