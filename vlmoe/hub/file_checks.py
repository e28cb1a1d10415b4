# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Whether the files of a saved model or checkpoint are whole, judged without loading them.

- JSON files parse, and hold the kind of value that files of their name do;
- safetensors files: the header parses, and the file has exactly the bytes that it promises. The
  format has no checksum: a flipped bit in a weight goes unseen;
- an index names shards that are there, and they hold the tensors that it lists;
- `*.pt`, `*.pth`, `*.bin` are whole zip archives, as `torch.save` writes them, with right
  checksums.

A problem is a text; None stands for a whole file.
"""

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .input_errors import InputError
from .json_files import parse_json, read_json
from .json_kinds import json_problem

_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "BF16": 16,
    "C64": 64,
}


def content_problems(folder: Path, leave_out: tuple[str, ...] = ()) -> Iterator[str]:
    """`file: problem` for every file of `folder` that is not whole."""
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


def tensor_headers(folder: Path) -> dict[str, dict[str, Any]]:
    """`shape`, `dtype` (F32, I8, ...) and `data_offsets` of every tensor in safetensors files, by
    name."""
    headers: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        headers |= _safetensors_header(file)[0]
    return headers


def _index_problem(file: Path) -> str | None:
    """Every shard that the index names is there and holds the tensors that the index expects in
    it."""
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
        held = tensor_headers(file.parent)
    except ValueError:
        return None  # the shard itself is reported
    lost = sorted(set(shard_of) - set(held))
    return f"the tensor {lost[0]} is in no shard" if lost else None


def _safetensors_problem(file: Path) -> str | None:
    """The header parses, tensors lie side by side from the first to the last byte, each as long as
    its shape says."""
    try:
        header, data_bytes = _safetensors_header(file)
    except ValueError as error:
        return str(error)
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        start, end = entry["data_offsets"]
        bits = math.prod(entry["shape"]) * _bits_of(entry["dtype"])
        if start != position or (bits and (end - start) * 8 != bits):
            return f"the tensor {name} does not have the bytes that its shape needs"
        position = end
    if position != data_bytes:
        return f"holds {data_bytes} bytes of tensors where its header promises {position}"
    return None


def _safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """Entries by tensor name, and the number of bytes after the header.

    Raises:
        ValueError: the file is too short for its header, or the header is not what the format asks
            for.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"has {size} bytes, too few for its header")
        raw = stream.read(length)
    try:
        header = parse_json(raw, "it")
        header.pop("__metadata__", None)
        for entry in header.values():
            start, end = entry["data_offsets"]
            numbers = [start, end, *entry["shape"]]
            valid = (
                isinstance(entry["dtype"], str)
                and all(type(number) is int and number >= 0 for number in numbers)
                and start <= end
            )
            if not valid:
                raise ValueError(f"bad entry {entry}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header cannot be read ({error})") from error
    return header, size - 8 - length


def _bits_of(dtype: str) -> int:
    """Bits of one number of a safetensors dtype (`F32` -> 32); 0 if it is not known."""
    digits = re.fullmatch(r"[FIU](\d+)", dtype)
    return _BITS[dtype] if dtype in _BITS else int(digits.group(1)) if digits else 0


def _archive_problem(file: Path) -> str | None:
    """`torch.save` writes a zip archive: its directory is at the end, and each member has a
    checksum."""
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
