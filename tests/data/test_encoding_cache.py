"""The byte-bounded cache."""

import pickle

import pytest

from vlmoe.data.encoding import ByteBoundedCache


def test_least_recently_used_value_is_dropped_first() -> None:
    cache: ByteBoundedCache[str, int] = ByteBoundedCache(10)
    cache.put("a", 1, 5)
    cache.put("b", 2, 5)
    assert cache.get("a") == 1  # now b is the least recently used
    cache.put("c", 3, 5)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
    assert cache.num_bytes == 10


def test_value_larger_than_the_bound_is_not_kept() -> None:
    cache: ByteBoundedCache[str, int] = ByteBoundedCache(10)
    cache.put("a", 1, 5)
    cache.put("b", 2, 11)
    assert (cache.get("a"), cache.get("b"), len(cache)) == (1, None, 1)


def test_replacing_a_value_counts_its_bytes_once() -> None:
    cache: ByteBoundedCache[str, int] = ByteBoundedCache(10)
    for value in range(5):
        cache.put("a", value, 6)
    assert (cache.get("a"), cache.num_bytes) == (4, 6)


def test_pickled_copy_is_empty_and_keeps_the_bound() -> None:
    cache: ByteBoundedCache[str, int] = ByteBoundedCache(10)
    cache.put("a", 1, 5)
    copy = pickle.loads(pickle.dumps(cache))
    assert (len(copy), copy.max_bytes) == (0, 10)


def test_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes must be 0 or more, got -1"):
        ByteBoundedCache(-1)
