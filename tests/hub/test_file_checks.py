"""Damaged safetensors files are named with the reason, without a look at their weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlmoe.hub.file_checks import content_problems, tensor_dtypes

Header = dict[str, Any]


def with_header(change: Callable[[Header], None]) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[end:]

    return damage


def set_field(name: str, field: str, value: Any) -> Callable[[bytes], bytes]:
    return with_header(lambda header: header[name].update({field: value}))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut data": lambda content: content[:-4],
    "extra bytes": lambda content: content + b"xx",
    "cut header": lambda content: content[:30],
    "empty": lambda content: b"",
    "zero length": lambda content: bytes(8) + content[8:],
    "huge length": lambda content: (2**62).to_bytes(8, "little") + content[8:],
    "wrong shape": set_field("a", "shape", [3, 5]),
    "negative shape": set_field("a", "shape", [-3, 4]),
    "shape beyond 64 bits": set_field("a", "shape", [2**63, 4]),
    "wrong offset": set_field("a", "data_offsets", [0, 44]),
    "overlap": set_field("b", "data_offsets", [0, 5]),
    "unknown dtype": set_field("a", "dtype", "X9"),
    "no entry": with_header(lambda header: header.update({"a": 5})),
    "no JSON": lambda content: content[:8] + b"x" * (len(content) - 8),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An intact file with two tensors."""
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_safetensors_file_is_named(file: Path, damage: str) -> None:
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    (problem,) = content_problems(file.parent)
    assert problem.startswith("model.safetensors: damaged (") and problem.count("\n") == 0


def test_an_intact_safetensors_file_has_no_problem_and_known_dtypes(file: Path) -> None:
    assert not list(content_problems(file.parent))
    assert tensor_dtypes(file.parent) == {"a": "F32", "b": "I8"}


def test_no_weight_is_read(file: Path) -> None:
    """A tensor of a terabyte, all of it a hole in the file, is judged at once."""
    count = 2**38
    header = json.dumps({"a": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}})
    with open(file, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header.encode())
        stream.truncate(8 + len(header) + 4 * count)
    assert not list(content_problems(file.parent))
    assert tensor_dtypes(file.parent) == {"a": "F32"}
    with open(file, "ab") as stream:
        stream.write(b"x")
    assert list(content_problems(file.parent))
