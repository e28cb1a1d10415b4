# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write the card of a saved model from the files in its folder.

vlmoe card outputs/demo/model --output model_cards/vlmoe-tiny-easy-vqa
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
        str | None,
        typer.Option(
            metavar="USER/NAME", help="The repo on the Hub that the card's examples load from."
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="The license (default: that of the model that was trained on)."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            parser=place,
            metavar="FOLDER",
            help="Folder for the card and the files it is rendered from (default: the model's).",
        ),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Write the card of a saved model from the files in its folder.

    `vlmoe train`, `evaluate`, `demo` and `push` write the card too. This command is for a model
    that was saved in another way, for a repo or a license that the files do not name, or for a copy
    of the card in another folder.

    examples:
      vlmoe card outputs/tiny --repo_id user/tiny-vlmoe
      vlmoe card outputs/tuned --license mit
      vlmoe card outputs/demo/model --output model_cards/vlmoe-tiny-easy-vqa
    """
    from vlmoe.hub.card_folder import write_card

    print(f"Written to {write_card(folder, output, repo_id=repo_id, license=license)}.")


if __name__ == "__main__":
    sys.exit(run("card", main))
