# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Fields of data that nobody reads: naming them, and the known field that was probably meant."""

import difflib
import functools
from collections.abc import Iterable

SIMILAR = 0.8
"""From this similarity on, a column counts as a known one that is misspelled."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


@functools.lru_cache(maxsize=1024)  # every row of a dataset asks the same
def misspelled(given: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, str] | None:
    """The first given name that is almost a known one which is absent, and that known one."""
    absent = [name for name in known if name not in given]
    for name in given:
        if name not in known and isinstance(name, str):
            close = difflib.get_close_matches(name.lower(), absent, n=1, cutoff=SIMILAR)
            if close:
                return name, close[0]
    return None
