"""Finds equal values in a stream that does not fit into memory, by sorting on disk in parts."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

_PARTS = 64
_BUFFER = 8 << 20
"""Bytes of hashes in memory before they are written."""


def hash64(text: str) -> bytes:
    """Eight bytes of a text's hash: among 100 million texts, two collide with a probability of 1 in 4,000."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


class ExternalDedup:
    """A stream of 8-byte hashes, numbered from 0; finds for each the first one that is equal.

    The hashes are written to files by their first bits, so that equal ones are in one file, and each is sorted alone.
    """

    def __init__(self, folder: Path) -> None:
        """Start an empty stream in a new folder, which must stay until the end."""
        folder.mkdir()
        self._folder = folder
        self._files = [(folder / f"{part:02d}").open("wb") for part in range(_PARTS)]
        self._buffer = bytearray()
        self._written = 0

    def __len__(self) -> int:
        return self._written + len(self._buffer) // 8

    def add(self, hash: bytes) -> None:
        """Append the next hash."""
        self._buffer += hash
        if len(self._buffer) >= _BUFFER:
            self._write()

    def first_equal(self, without: np.ndarray | None = None, limit: int = 0) -> np.ndarray:
        """The number of the first equal hash for each, its own if there is none before: uint64 [n], on disk.

        Args:
            without: bool [n], hashes that are ignored; they get 0.
            limit: If more than so many are equal, they form groups of this size, each with its own first. 0 is no
                limit.
        """
        self._write()
        for file in self._files:
            file.close()
        if not len(self):
            return np.empty(0, np.uint64)
        result = np.memmap(self._folder / "firsts", np.uint64, "w+", shape=(len(self),))
        for hashes, numbers in self._sorted():
            if without is not None:
                included = ~without[numbers]
                hashes, numbers = hashes[included], numbers[included]
            if not len(hashes):
                continue
            is_start = np.concatenate(([True], hashes[1:] != hashes[:-1]))
            start = np.flatnonzero(is_start)[np.cumsum(is_start) - 1]
            if limit:
                start += (np.arange(len(hashes)) - start) // limit * limit
            result[numbers] = numbers[start]
        return result

    def _sorted(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in range(_PARTS):
            rows = np.fromfile(self._folder / f"{part:02d}", "<u8").reshape(-1, 2)
            order = np.argsort(rows[:, 0], kind="stable")
            yield rows[order, 0], rows[order, 1]

    def _write(self) -> None:
        hashes = np.frombuffer(bytes(self._buffer), "<u8")
        numbers = np.arange(self._written, self._written + len(hashes), dtype=np.uint64)
        rows, parts = np.stack([hashes, numbers], 1), hashes >> np.uint64(58)
        for part, file in enumerate(self._files):
            rows[parts == part].astype("<u8").tofile(file)
        self._written += len(hashes)
        self._buffer.clear()
