# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The console command `vlmoe`.

    vlmoe --help
    vlmoe train --help

Each subcommand is a module of this package with a function `main(argv)`; it is imported when it is
called, and the modules import torch and transformers only when there is work to do.
"""

import importlib
import sys

from .command_line import EXIT_ERROR, run_command
from .option_parser import close_matches

COMMANDS = {
    "data": "Check a dataset without training: what it holds, and every fault by row.",
    "train": "Train a model from a preset, or go on with a saved one.",
    "evaluate": "Let a model answer the questions of a dataset and count the right answers.",
    "generate": "Ask a model a question about images, or a question alone.",
    "inspect": "Show on one page which experts the tokens of data or of a question are sent to.",
    "card": "Write the card of a saved model from the files in its folder.",
    "upcycle": "Turn a dense vision-language model into a sparse one that computes the same.",
    "merge": "Add a LoRA adapter to its base model's weights and save the model.",
    "export-lora": "Write a LoRA adapter of experts with one key per expert.",
    "push": "Push the folder of a trained model to the Hugging Face Hub.",
    "demo": "Train, evaluate and ask the tiny model on real data, start to end.",
}
MODULES = {
    "inspect": "inspect_experts",
    "push": "push_to_hub",
    "export-lora": "export_lora",
}  # where it is not the command's name

EXAMPLES = """\
examples:
  vlmoe data my_data
  vlmoe train --model tiny --dataset easy_vqa --eval_split test --output_dir outputs/tiny
  vlmoe evaluate --model outputs/tiny --dataset easy_vqa --split test --batch_size 256
  vlmoe generate --model outputs/tiny --image picture.png "What shape does the image contain?"
  vlmoe inspect --model outputs/tiny --dataset easy_vqa --output_dir outputs/inspect
  vlmoe upcycle user/dense --output_dir outputs/sparse
  vlmoe push outputs/tiny --repo_id user/tiny-vlmoe

`vlmoe COMMAND --help` lists the options of a command; --traceback shows an error's origin."""


def main(argv: list[str] | None = None) -> int:
    """Run `vlmoe COMMAND ...` and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    command = arguments[0] if arguments else ""
    if command in COMMANDS:
        module = importlib.import_module(f"{__package__}.{MODULES.get(command, command)}")
        return run_command(f"vlmoe {command}", module.main, arguments[1:])
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"vlmoe {version('vlmoe')}")
        return 0
    matches = close_matches(arguments[0], list(COMMANDS))
    print(
        f"vlmoe: error: there is no command {arguments[0]!r}{matches}. See `vlmoe --help`.",
        file=sys.stderr,
    )
    return EXIT_ERROR


def usage() -> str:
    """The text of `vlmoe --help`."""
    table = "\n".join(f"  {name:<12} {summary}" for name, summary in COMMANDS.items())
    return f"usage: vlmoe COMMAND [options]\n\ncommands:\n{table}\n\n{EXAMPLES}"


if __name__ == "__main__":
    sys.exit(main())
