# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Push the folder of a trained model to the Hugging Face Hub, in one commit.

    vlmoe push outputs/tiny --repo_id user/tiny-vlmoe

The commit holds weights, config, processor, code, results, pictures and the card. Checkpoints,
optimizer state and logs are not pushed.
"""

import sys

from .command_line import run_command
from .option_parser import command_options, require
from .options import PushOptions

EPILOG = """\
examples:
  vlmoe push outputs/tiny --repo_id user/tiny-vlmoe
  vlmoe push outputs/tiny --repo_id user/tiny-vlmoe --private --message "Three epochs more"
  vlmoe push outputs/tiny --repo_id user/tiny-vlmoe --revision experiment

Log in first with `hf auth login`, or set HF_TOKEN to a token with write access."""


def main(argv: list[str]) -> None:
    """Run `vlmoe push`."""
    parsed = command_options(
        argv,
        [PushOptions],
        usage="vlmoe push FOLDER --repo_id USER/NAME [options]",
        description="Push the folder of a trained model to the Hugging Face Hub, in one commit.",
        epilog=EPILOG,
        argument=("folder", "Folder of the model, as `vlmoe train` saves it."),
    )
    if parsed is None:
        return
    options, rest = parsed
    require(options.repo_id, "repo_id", "push")
    import vlmoe

    print(f"\n{vlmoe.push(rest.folder, **vars(options)).table()}")


if __name__ == "__main__":
    sys.exit(run_command("vlmoe push", main))
