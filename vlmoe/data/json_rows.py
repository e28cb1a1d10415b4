# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Check data files before they are parsed: their encoding, and the depth of JSON.

Arrow's JSON parser recurses once per level: deep nesting overflows the stack and kills the
process. The scan goes over the bytes in chunks and builds no objects: 3 to 5 s per GB.
"""

import re
from pathlib import Path

import numpy as np

from ..hub.input_errors import InputError
from ..hub.json_files import MAX_JSON_DEPTH

CHUNK_BYTES = 1 << 24
MAX_LINE_BYTES = (1 << 31) - 1
"""The longest row, or whole file that is one list, that Arrow takes at once."""
NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}\n'))
STRING = re.compile(rb'"[^"\n]*["\n]')
STEPS = np.zeros(256, dtype=np.int64)
STEPS[list(b"[{")], STEPS[list(b"]}")] = 1, -1


def require_utf8(file: Path) -> None:
    """Raise `InputError` for a text file in UTF-16 or UTF-32, as some Windows programs write."""
    with open(file, "rb") as opened:
        start = opened.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        raise InputError(
            f"{file}: is in UTF-16 or UTF-32, not UTF-8. Save it as UTF-8 (in a shell: iconv -f "
            f"UTF-16 -t UTF-8 {file.name} > NEW_FILE)."
        )


def require_shallow(file: Path) -> None:
    """Raise `InputError` for JSON nested deeper than `MAX_JSON_DEPTH`, or with too long a line.

    Lists and objects that are never closed count, too.
    """
    depth, in_string, line, carried = 0, False, 0, b""
    with open(file, "rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            line += chunk.find(b"\n") if b"\n" in chunk else len(chunk)
            if line > MAX_LINE_BYTES:
                raise InputError(
                    f"{file}: has a line of more than {MAX_LINE_BYTES:,} bytes. Write one row per "
                    "line (.jsonl)."
                )
            line = len(chunk) - chunk.rfind(b"\n") - 1 if b"\n" in chunk else line
            chunk = carried + chunk
            carried = chunk[
                len(chunk.rstrip(b"\\")) :
            ]  # the escaped character is in the next chunk
            structure, in_string = _structure(chunk[: len(chunk) - len(carried)], in_string)
            levels = depth + np.cumsum(STEPS[np.frombuffer(structure, np.uint8)])
            levels -= np.minimum.accumulate(np.minimum(levels, 0))  # unmatched ] do not count
            if levels.max(initial=0) > MAX_JSON_DEPTH:
                raise InputError(
                    f"{file}: nested too deep, or never closed; JSON is read to a depth of "
                    f"{MAX_JSON_DEPTH}."
                )
            depth = int(levels[-1]) if len(levels) else depth


def _structure(chunk: bytes, in_string: bool) -> tuple[bytes, bool]:
    """Return the brackets of a chunk outside strings, and whether it ends inside a string."""
    unescaped = chunk.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = (b'"' if in_string else b"") + unescaped.translate(None, NOT_STRUCTURE)
    marks = marks.replace(b'""', b"")  # shortens the regex's work; parity of quotes stays
    outside, quote, _ = STRING.sub(b"", marks).partition(b'"')
    return outside, bool(quote)
