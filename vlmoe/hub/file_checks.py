# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Judge the files of a saved model or checkpoint without loading them.

- JSON files parse, and hold the kind of value that files of their name do;
- safetensors files: the header parses and describes exactly the bytes that follow. The format has
  no checksum: a flipped bit in a weight is not seen;
- an index names shards that exist, and they hold the tensors that it lists;
- `*.pt`, `*.pth`, `*.bin` are whole zip archives, as `torch.save` writes them, with right
  checksums.

Checkers return a description of the problem, or None if the file is intact.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .input_errors import InputError
from .json_files import read_json
from .json_kinds import json_problem


def content_problems(folder: Path, leave_out: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield `file: problem` for every damaged file of `folder`."""
    for file in sorted(folder.iterdir()):
        problem = None
        if file.name in leave_out or not file.is_file():
            continue
        if file.name.endswith(".index.json"):
            problem = _index_problem(file)
        elif file.suffix == ".json":
            problem = json_problem(file)
        elif file.suffix == ".safetensors":
            problem = _safetensors_problem(file)
        elif file.suffix in (".pt", ".pth", ".bin"):
            problem = _archive_problem(file)
        if problem:
            yield f"{file.name}: {problem}"


def tensor_dtypes(folder: Path) -> dict[str, str]:
    """Read the dtype (F32, I8, ...) of every tensor in safetensors files, from their headers.

    Raises:
        SafetensorError: a file is damaged.
    """
    dtypes: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as weights:
            dtypes |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    return dtypes


def _index_problem(file: Path) -> str | None:
    """Require every shard that the index names, and in the shards the tensors that it lists."""
    try:
        shard_of = read_json(file).get("weight_map")
    except InputError as error:
        return str(error).removeprefix(f"{file}: ").rstrip(".")
    if not isinstance(shard_of, dict) or not shard_of:
        return "no weight map"
    for shard in shard_of.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            return f"the weight map names {shard!r:.60}, which is no file beside it"
    missing = sorted(name for name in set(shard_of.values()) if not (file.parent / name).is_file())
    if missing:
        return f"the shard {missing[0]} is missing"
    if not file.name.endswith(".safetensors.index.json"):
        return None
    try:
        held = tensor_dtypes(file.parent)
    except SafetensorError:
        return None  # the shard itself is reported
    lost = sorted(set(shard_of) - set(held))
    return f"the tensor {lost[0]} is in no shard" if lost else None


def _safetensors_problem(file: Path) -> str | None:
    """Open the file: its header must describe exactly the bytes that follow, and none is read."""
    try:
        with safe_open(file, "np"):
            return None
    except (SafetensorError, OSError) as error:
        return f"damaged ({str(error).removeprefix('Error while deserializing header: ')})"


def _archive_problem(file: Path) -> str | None:
    """Read the zip archive of `torch.save`: a directory at the end, a checksum for each member."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        return f"not a whole archive of torch.save ({error})"
    return f"the member {broken} of the archive is damaged" if broken else None
