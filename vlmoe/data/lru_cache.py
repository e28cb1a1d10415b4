# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A least-recently-used cache bounded by the bytes of what it holds."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteBoundedCache(Generic[Key, Value]):
    """Keeps the most recently used values whose sizes together stay within `max_bytes`.

    A value larger than the bound is not kept; `max_bytes=0` keeps nothing. A pickled copy (a data
    loader's worker process) starts empty.
    """

    def __init__(self, max_bytes: int) -> None:
        """An empty cache; raises `ValueError` for a negative bound."""
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be 0 or more, got {max_bytes}.")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        """The number of values held."""
        return len(self._entries)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        """Pickle the bound only: the content is rebuilt where it is used."""
        return type(self), (self.max_bytes,)

    def get(self, key: Key) -> Value | None:
        """The value of `key`, now the most recently used, or None."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Key, value: Value, num_bytes: int) -> None:
        """Keep `value`, which takes `num_bytes`, dropping the least recently used as needed."""
        previous = self._entries.pop(key, None)
        if previous is not None:
            self.num_bytes -= previous[1]
        if num_bytes > self.max_bytes:
            return
        self._entries[key] = (value, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.num_bytes -= dropped
