"""JSON files of a user: what is read, and the one line for what is not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vlmoe.hub import json_files
from vlmoe.hub.input_errors import InputError
from vlmoe.hub.json_files import MAX_JSON_DEPTH, read_json


@pytest.mark.parametrize(
    "content",
    [b'{"a": [1, 2.5, null]}', b'\xef\xbb\xbf{"a": [1, 2.5, null]}'],
    ids=["utf-8", "byte order mark"],
)
def test_an_object_is_read(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    assert read_json(file) == {"a": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b"[1]", "must hold an object; it holds a list"),
        (b"5", "must hold an object; it holds a number"),
        (b"null", "must hold an object; it holds null"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"a": ' + b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH + b"}", "nested too deep"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: .*{reason}"):
        read_json(file)


@pytest.mark.parametrize("kind", [list, (dict, list)])
def test_the_kind_of_the_top_level_is_the_callers(tmp_path: Path, kind: Any) -> None:
    file = tmp_path / "a.json"
    file.write_text("[1]")
    assert read_json(file, kind) == [1]


def test_the_deepest_file_that_is_allowed_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH)
    assert read_json(file, list)


def test_numbers_that_are_not_finite_are_read_where_the_caller_says_so(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"grad_norm": float("inf")}))
    assert read_json(file, finite=False) == {"grad_norm": float("inf")}


@pytest.mark.parametrize("make", [None, Path.mkdir], ids=["missing", "folder"])
def test_what_is_no_file_is_named(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "a.json"
    if make:
        make(path)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: cannot be read"):
        read_json(path)


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 10)
    file = tmp_path / "a.json"
    file.write_text('{"a": "0123456789"}')
    with pytest.raises(InputError, match="at most 10 are read"):
        read_json(file)
