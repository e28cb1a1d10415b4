# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write files that are either whole or absent, whenever the process dies.

A file is written under a hidden name beside its destination, flushed to disk, and renamed: on POSIX
a rename within one file system is atomic. A folder of files is staged in a hidden folder inside its
destination and moved file by file, the one without which nothing loads (`config.json`) removed
first and moved last. Hidden names hold host and process, so that leftovers of a killed process are
recognized. Published files get the permissions of the umask, though safetensors writes them for
their owner alone.
"""

import itertools
import logging
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .input_errors import writing
from .json_files import json_text

logger = logging.getLogger(__name__)

HIDDEN_FOLDERS = (".incoming.*", ".removed-*")
"""Leftovers of a killed process in a folder; see `staging_folder` and `remove_folder`."""

REPLACED_WEIGHTS = "_replaced-weights"
_LOADED_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "*.safetensors.index.json")
_UNFINISHED = re.compile(r"\..*\.(?P<host>[\w-]+)-(?P<pid>\d+)\.tmp(\.[^.]*)?", re.DOTALL)
_LONGEST_STEM = 80  # of the 255 bytes that a name may have; the host's may have 63
_umask_guard = threading.Lock()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds.

    The suffix is kept, since image writers choose their format by it.

    Raises:
        FileNotFoundError: the block ended without writing the file.
        OSError: it cannot be written; the error names `path`, not the temporary one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem.encode()[:_LONGEST_STEM].decode(errors="ignore")
    temporary = path.with_name(f".{stem}.{_host()}-{os.getpid()}.tmp{path.suffix}")
    try:
        with writing(path):
            yield temporary
            _flush_to_disk(temporary)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if str(temporary) in (error.filename, error.filename2):
            error.filename, error.filename2 = str(path), None
        elif str(temporary) in str(error):
            raise type(error)(str(error).replace(str(temporary), str(path))) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, data: object) -> None:
    """Write `data` as indented JSON, atomically.

    Raises:
        ValueError: a number in it is NaN or infinite; the message names its place.
    """
    text = json_text(data, str(path), indent=2) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def staging_folder(destination: str | Path) -> Path:
    """Make an empty hidden folder of this process inside `destination`, on its file system."""
    staging = Path(destination) / f".incoming.{_host()}-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish_folder(staging: Path, destination: str | Path, last: str = "config.json") -> None:
    """Move all files of `staging` into `destination`; a kill leaves no half-written model.

    `last` is removed from the destination first and arrives last: between the two moments the
    folder cannot be loaded as a model, and afterwards it is whole. Weight files of an older model
    that the new one does not have (other shards) would be loaded in its place: they are moved into
    the folder `_replaced-weights`.

    Raises:
        FileNotFoundError: `staging` does not hold `last`.
        ValueError: as `refuse_mixing`.
    """
    destination = Path(destination)
    if not (staging / last).is_file():
        raise FileNotFoundError(f"{staging} holds no {last}: there is no whole model to publish.")
    refuse_mixing(destination, is_adapter=last != "config.json")
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    for file in files:
        (staging / file).chmod(0o666 & ~_umask())
        _flush_to_disk(staging / file)
    (destination / last).unlink(missing_ok=True)
    _set_other_weights_aside(destination, files)
    for file in [*(file for file in files if str(file) != last), Path(last)]:
        (destination / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / file, destination / file)
    shutil.rmtree(staging, ignore_errors=True)


def refuse_mixing(destination: str | Path, *, is_adapter: bool) -> None:
    """Refuse to put a model into an adapter's folder, or an adapter into a model's.

    Neither would load.

    Raises:
        ValueError: names the folder and its kind.
    """
    name, held = ("config.json", "a model") if is_adapter else ("adapter_config.json", "an adapter")
    if (Path(destination) / name).is_file():
        kind = "an adapter" if is_adapter else "a model"
        raise ValueError(
            f"{destination} holds {held} ({name}), beside which {kind} would not load; choose "
            "another --output_dir."
        )


def remove_folder(folder: Path) -> None:
    """Rename a folder out of sight, then delete it: other code finds it by name."""
    hidden = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_unfinished_files(folder: Path) -> None:
    """Delete temporary files of `atomic_path` whose process, of this host, has ended."""
    for path in folder.glob(".*.tmp*"):
        found = _UNFINISHED.fullmatch(path.name)
        if found and found["host"] == _host() and not _is_alive(int(found["pid"])):
            path.unlink(missing_ok=True)


def open_to_readers(folder: Path) -> None:
    """Give weights that safetensors wrote for their owner alone the mode of all other files."""
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~_umask())


def free_name(path: Path) -> Path:
    """Return `path`, or `path` with the first number that makes it new."""
    candidates = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return path if not path.exists() else next(each for each in candidates if not each.exists())


def _set_other_weights_aside(destination: Path, files: list[Path]) -> None:
    others = {
        path
        for pattern in _LOADED_WEIGHTS
        for path in destination.glob(pattern)
        if path.relative_to(destination) not in files
    }
    if others:
        folder = free_name(destination / REPLACED_WEIGHTS)
        folder.mkdir()
        for path in others:
            path.rename(folder / path.name)
        logger.warning("Weights of an older model in %s were moved to %s.", destination, folder)


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname())[:63]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _umask() -> int:
    with _umask_guard:  # it can only be read by setting it
        umask = os.umask(0)
        os.umask(umask)
    return umask


def _flush_to_disk(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"Nothing was written to {path}.")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
