"""Tables of numbers on disk, sorted by a mixed key, so that each bucket is a slice.

A bucket is a range of keys. As the key is a function of the number alone, what a bucket holds does not depend on how
many files the numbers came from; and tables of many files are merged a bucket at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lavic.storage.atomic import atomic_open

BUCKETS = 1024

_SHIFT = np.uint64(64 - 10)
# Multiplying by an odd number is a bijection of 64 bits that spreads neighbours over all of them.
_FACTOR = 0x9E3779B97F4A7C15
_INVERSE = pow(_FACTOR, -1, 1 << 64)


def keys_of(numbers: np.ndarray) -> np.ndarray:
    """The mixed key of each number: uint64 [n]."""
    return np.asarray(numbers, np.uint64) * np.uint64(_FACTOR)


def numbers_of(keys: np.ndarray) -> np.ndarray:
    """The number of each key: uint64 [n]."""
    return np.asarray(keys, np.uint64) * np.uint64(_INVERSE)


def key_of(number: int) -> int:
    """The mixed key of one number."""
    return number * _FACTOR & (1 << 64) - 1


def bucket_of(number: int) -> int:
    """The bucket of a number."""
    return key_of(number) >> int(_SHIFT)


def write_table(path: Path, numbers: np.ndarray, values: np.ndarray | None = None) -> None:
    """Writes numbers, each with a value, as a table; pairs that occur twice are written once.

    Args:
        path: File of the keys, written last. The values are in a second file in the same folder.
        numbers: uint64 [n].
        values: uint64 [n]; None for a set of numbers.
    """
    columns = np.zeros((len(numbers), 2), np.uint64)
    columns[:, 0] = keys_of(numbers)
    columns[:, 1] = 0 if values is None else values
    _write(path, iter([columns]), values is not None)


def merge_tables(path: Path, tables: Sequence[Path], *, with_values: bool) -> None:
    """Writes several tables as one, holding one bucket of them in memory."""
    opened = [Table(table) for table in tables]
    buckets = (np.concatenate([table.bucket(n) for table in opened]) for n in range(BUCKETS) if opened)
    _write(path, buckets, with_values)


def _write(path: Path, parts: Iterator[np.ndarray], with_values: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as keys:
        if not with_values:
            for part in parts:
                keys.write(np.unique(part[:, 0]).tobytes())
            return
        with atomic_open(_values_of(path)) as values:
            for part in parts:
                # In the order of the keys, then of the values.
                ordered = np.unique(part, axis=0) if len(part) else part
                keys.write(np.ascontiguousarray(ordered[:, 0]).tobytes())
                values.write(np.ascontiguousarray(ordered[:, 1]).tobytes())


class Table:
    """A table of `write_table` or `merge_tables`, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._keys = _map(path)
        self._values = _map(_values_of(path)) if _values_of(path).exists() else None

    def __len__(self) -> int:
        return len(self._keys)

    def bucket(self, n: int) -> np.ndarray:
        """Keys and values of a bucket, in their order: uint64 [n, 2]."""
        edges = np.array([n, n + 1], np.uint64) << _SHIFT
        start, end = np.searchsorted(self._keys, edges)
        if n == BUCKETS - 1:
            end = len(self._keys)
        columns = np.zeros((int(end - start), 2), np.uint64)
        columns[:, 0] = self._keys[start:end]
        if self._values is not None:
            columns[:, 1] = self._values[start:end]
        return columns

    def contains(self, numbers: np.ndarray) -> np.ndarray:
        """Whether each number is in the table: bool [n] for uint64 [n]."""
        keys = keys_of(numbers)
        indices = np.searchsorted(self._keys, keys)
        known = indices < len(self._keys)
        known[known] = self._keys[indices[known]] == keys[known]
        return known

    def values(self, number: int) -> list[int]:
        """The values of a number, smallest first; none where it is not in the table."""
        key = keys_of(np.array([number], np.uint64))[0]
        start, end = np.searchsorted(self._keys, [key, key], "left")[0], np.searchsorted(self._keys, key, "right")
        return [] if self._values is None else [int(value) for value in self._values[start:end]]


def _map(path: Path) -> np.ndarray:
    return np.memmap(path, "<u8", "r") if path.stat().st_size else np.empty(0, np.uint64)


def _values_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.values")
