"""The scan of JSON against a reference that goes from character to character."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from vlmoe.data import json_rows
from vlmoe.data.json_rows import require_shallow
from vlmoe.hub.input_errors import InputError


def depth_of(text: str) -> int:
    """The deepest level; a line break ends a string, as none may hold one."""
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            in_string = character != "\n" and (escaped or character != '"')
            escaped = not escaped and character == "\\"
        elif character == '"':
            in_string, escaped = True, False
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth = max(depth - 1, 0)
    return deepest


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth > 5 or kind < 0.3:
        return rng.choice(['a"b', "\\", '\\\\"', "[[[", "}}", 'x\n"', "é\\u"]) * rng.randint(0, 3)
    inner = [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return inner if kind < 0.6 else {f'k"[\\{i}': each for i, each in enumerate(inner)}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50, 1 << 20])
def test_the_depth_is_that_of_the_json_wherever_chunks_end(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, file = random.Random(chunk), tmp_path / "rows.jsonl"
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk)
    for _ in range(200):
        text = "\n".join(json.dumps(value(rng)) for _ in range(rng.randint(1, 5)))
        file.write_text(text, encoding="utf-8")
        monkeypatch.setattr(json_rows, "MAX_JSON_DEPTH", depth_of(text))
        require_shallow(file)
        monkeypatch.setattr(json_rows, "MAX_JSON_DEPTH", depth_of(text) - 1)
        with pytest.raises(InputError, match="nested too deep"):
            require_shallow(file)


@pytest.mark.parametrize("chunk", [3, 10, 1000])
@pytest.mark.parametrize(
    ("text", "is_refused"),
    [
        ("a" * 30, False),
        ("a" * 31, True),
        ("a" * 30 + "\n" + "b" * 30, False),
        ("a\n" + "b" * 31 + "\n", True),
        ("a" * 31 + "\nb", True),
    ],
)
def test_a_line_has_a_longest_length(
    tmp_path: Path, text: str, is_refused: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", min(chunk, 30))
    monkeypatch.setattr(json_rows, "MAX_LINE_BYTES", 30)
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    if is_refused:
        with pytest.raises(InputError, match=r"rows\.jsonl: has a line of more than 30 bytes"):
            require_shallow(file)
    else:
        require_shallow(file)
