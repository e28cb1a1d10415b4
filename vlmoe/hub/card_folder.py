# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write the card of a saved model beside it, or into another folder with its source files."""

import os
import shutil
from pathlib import Path

from .atomic_files import atomic_path
from .folder_lock import folder_lock
from .model_card import CARD_FILE, CARD_SOURCES, may_write, write_model_card
from .whole_model import weights_problems

Folder = str | os.PathLike[str]


def write_card(
    folder: Folder,
    output: Folder | None = None,
    *,
    repo_id: str | None = None,
    license: str | None = None,
) -> Path:
    """Write the card of a saved model and return its path.

    Args:
        folder: of the model.
        output: folder for the card and the files it is rendered from; by default the model's own.
        repo_id: the repo on the Hub that the card's examples load from.
        license: of the model; by default that of the model that was trained on.

    Raises:
        FileNotFoundError: the folder holds no config.json.
        ValueError: the folder holds another model or other weights, a file there is damaged, the
            README.md there was edited by hand, or the target holds another model or is in use.
        OSError: the target cannot be written into.
    """
    source = Path(folder).expanduser()
    target = Path(output).expanduser() if output else source
    is_copy = source.resolve() != target.resolve()
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json: a card describes a saved model.")
    if problems := list(weights_problems(source)):
        raise ValueError(f"{source} holds no whole model: {'; '.join(problems)}.")
    if is_copy:
        _require_place_for_copies(target)
    with folder_lock(target):
        if not may_write(target / CARD_FILE):
            raise ValueError(
                f"{target / CARD_FILE} was written or changed by hand; delete it to get a new one."
            )
        if is_copy:
            _copy_sources(source, target)
        metadata = {"license": license} if license else {}
        return write_model_card(target, repo_id=repo_id, metadata=metadata)


def _require_place_for_copies(target: Path) -> None:
    """Refuse a folder with files of the same names, unless an earlier card came with them."""
    weights = [path.name for path in target.glob("*") if path.suffix in (".safetensors", ".bin")]
    held = [name for name in CARD_SOURCES if (target / name).exists()]
    if weights or (held and not (target / CARD_FILE).is_file()):
        raise ValueError(
            f"{target} holds {[*weights, *held][0]}, which the files of the card would replace: "
            "choose another output folder."
        )


def _copy_sources(source: Path, target: Path) -> None:
    for name in CARD_SOURCES:
        if not (source / name).is_file():
            (target / name).unlink(missing_ok=True)  # of another model
            continue
        with atomic_path(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
