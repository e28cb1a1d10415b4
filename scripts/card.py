# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write the card of a saved model anew, from the files in its folder.

    vlmoe card outputs/demo/model --output model_cards/vlmoe-tiny-easy-vqa

`vlmoe train`, `evaluate`, `demo` and `push` do so by themselves; this is for a model that was saved
in another way, a repo or a licence that the files do not tell, or a copy of the card elsewhere.
"""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from .commands import run
from .config_file import ConfigFile
from .options import CardOptions
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
    path = card(folder, CardOptions(repo_id=repo_id, license=license, output=output))
    print(f"Written to {path}.")


def card(folder: str | Path, options: CardOptions) -> Path:
    """Write the card; returns its path.

    Raises:
        FileNotFoundError: the folder holds no config.json.
        ValueError: the folder is of another model or holds other weights, a file there is damaged,
            the README.md there is its author's own, or the target holds another model or is in use.
        OSError: the target cannot be written into.
    """
    from vlmoe.hub.folder_lock import folder_lock
    from vlmoe.hub.whole_model import weights_problems

    source = Path(folder).expanduser()
    target = Path(options.output).expanduser() if options.output else source
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json: a card tells of a saved model.")
    if problems := list(weights_problems(source)):
        raise ValueError(f"{source} holds no whole model: {'; '.join(problems)}.")
    if source.resolve() != target.resolve():
        _require_place_for_copies(target)
    with folder_lock(target):
        return _card(source, target, options)


def _require_place_for_copies(target: Path) -> None:
    """Refuse a folder with files of the same names, unless an earlier card came with them."""
    from vlmoe.hub.model_card import CARD_FILE, CARD_SOURCES

    weights = [path.name for path in target.glob("*") if path.suffix in (".safetensors", ".bin")]
    held = [name for name in CARD_SOURCES if (target / name).exists()]
    if weights or (held and not (target / CARD_FILE).is_file()):
        raise ValueError(
            f"--output {target} holds {[*weights, *held][0]}: the files that come with the card "
            "would replace those of something else. Choose another folder."
        )


def _card(source: Path, target: Path, options: CardOptions) -> Path:
    from vlmoe.hub.atomic_files import atomic_path
    from vlmoe.hub.model_card import CARD_FILE, CARD_SOURCES, may_write, write_model_card

    if not may_write(target / CARD_FILE):
        raise ValueError(
            f"{target / CARD_FILE} was written or changed by hand; delete it to get a new one."
        )
    for name in CARD_SOURCES if source.resolve() != target.resolve() else ():
        if not (source / name).is_file():
            (target / name).unlink(missing_ok=True)  # of another model
            continue
        with atomic_path(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
    metadata = {"license": options.license} if options.license else {}
    return write_model_card(target, repo_id=options.repo_id, metadata=metadata)


if __name__ == "__main__":
    sys.exit(run("card", main))
