# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Push the folder of a trained model to the Hugging Face Hub, in one commit.

vlmoe push outputs/tiny --repo_id user/tiny-vlmoe
"""

import sys
from typing import Annotated

import typer

from .commands import run
from .config_file import ConfigFile
from .shared_options import place


def main(
    folder: Annotated[str, typer.Argument(parser=place, help="The folder of the model.")],
    repo_id: Annotated[
        str,
        typer.Option(
            metavar="USER/NAME", help="The repo on the Hub; it is created if it does not exist."
        ),
    ],
    private: Annotated[
        bool,
        typer.Option(help="Create the repo as a private one; an existing repo stays as it is."),
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch to push to; it is created if it does not exist (default: main)."),
    ] = None,
    message: Annotated[
        str | None, typer.Option(help="Commit message (default: Upload FOLDER).")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="Token with write access (default: HF_TOKEN, or the token of `hf auth login`)."
        ),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Push the folder of a trained model to the Hugging Face Hub, in one commit.

    The commit holds the files that others need: weights, config, processor, the model's code,
    results, figures and the card. Checkpoints, optimizer state and logs stay on this machine. Until
    the commit is made, the repo loads as before; start a failed push again to let it continue.
    Weights files of an earlier push that the folder no longer has are removed in the same commit.

    Log in first with `hf auth login`, or set HF_TOKEN to a token with write access.

    examples:
      vlmoe push outputs/tiny --repo_id user/tiny-vlmoe
      vlmoe push outputs/tiny --repo_id user/tiny-vlmoe --private --message "Three epochs more"
      vlmoe push outputs/tiny --repo_id user/tiny-vlmoe --revision experiment
    """
    import vlmoe

    pushed = vlmoe.push(
        folder, repo_id, private=private, revision=revision, message=message, token=token
    )
    print(f"\n{pushed.table()}")


if __name__ == "__main__":
    sys.exit(run("push", main))
