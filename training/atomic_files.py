# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Files that are either whole or absent, whenever the process dies.

A file is written under a hidden name beside its destination, flushed to disk, and renamed: on POSIX
a rename within one file system is atomic. A folder of files is staged in a hidden folder inside its
destination and moved file by file, the one without which nothing loads (`config.json`) removed
first and moved last.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAGING_NAME = ".incoming"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends without an
    error.

    The suffix is kept, since image writers choose their format by it.

    Raises:
        FileNotFoundError: the block ended without writing the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON, atomically."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def staging_folder(destination: str | Path) -> Path:
    """An empty hidden folder inside `destination`, on the same file system; what a killed run left
    is removed."""
    staging = Path(destination) / STAGING_NAME
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish_folder(staging: Path, destination: str | Path, last: str = "config.json") -> None:
    """Move all files of `staging` into `destination`, so that a kill leaves nothing half written
    that loads.

    `last` is removed from the destination first and arrives last: between the two moments the
    folder cannot be loaded as a model, and afterwards it is whole. Weight files of an older model
    that the new one does not have (other shards) are removed.

    Raises:
        FileNotFoundError: `staging` does not hold `last`.
    """
    destination = Path(destination)
    if not (staging / last).is_file():
        raise FileNotFoundError(f"{staging} holds no {last}: there is no whole model to publish.")
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    for file in files:
        _flush_to_disk(staging / file)
    (destination / last).unlink(missing_ok=True)
    _remove_other_weights(destination, files)
    for file in [*(file for file in files if str(file) != last), Path(last)]:
        (destination / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / file, destination / file)
    shutil.rmtree(staging, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder that other code finds by name: first rename it out of sight, then delete what
    it holds."""
    hidden = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _remove_other_weights(destination: Path, files: list[Path]) -> None:
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for path in destination.glob(pattern):
            if path.relative_to(destination) not in files:
                path.unlink()


def _flush_to_disk(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"Nothing was written to {path}.")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
