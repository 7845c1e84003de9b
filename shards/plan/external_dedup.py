"""Which of many values came before, for more of them than memory holds: sorted on the disk, in parts."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

_PARTS = 64
_HELD = 8 << 20
"""Bytes of values kept in memory before they are written out."""


def mark_of(text: str) -> bytes:
    """Eight bytes that stand for a text: of a hundred million different ones, two are taken for one once in 4,000."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


class Repeats:
    """A stream of marks, numbered from 0, and for each the first one that equals it.

    The marks are dealt by their first bits into files, so that equal ones meet in one; each is sorted by itself.
    """

    def __init__(self, folder: Path) -> None:
        """Begin an empty stream in an empty folder, which must stay until the end."""
        folder.mkdir()
        self._folder = folder
        self._files = [(folder / f"{part:02d}").open("wb") for part in range(_PARTS)]
        self._held = bytearray()
        self._written = 0

    def __len__(self) -> int:
        return self._written + len(self._held) // 8

    def add(self, mark: bytes) -> None:
        """Append the next mark."""
        self._held += mark
        if len(self._held) >= _HELD:
            self._write()

    def firsts(self, without: np.ndarray | None = None, most: int = 0) -> np.ndarray:
        """For each number that of the first equal mark, its own where there is none before: uint64 [n], on the disk.

        Args:
            without: bool [n], marks that are not looked at; they get 0.
            most: Where more than so many are equal, a new row begins with the next: its first is its own first. 0 is
                no limit.
        """
        self._write()
        for file in self._files:
            file.close()
        if not len(self):
            return np.empty(0, np.uint64)
        found = np.memmap(self._folder / "firsts", np.uint64, "w+", shape=(len(self),))
        for marks, numbers in self._sorted():
            if without is not None:
                wanted = ~without[numbers]
                marks, numbers = marks[wanted], numbers[wanted]
            if not len(marks):
                continue
            begins = np.concatenate(([True], marks[1:] != marks[:-1]))
            start = np.flatnonzero(begins)[np.cumsum(begins) - 1]
            if most:
                start += (np.arange(len(marks)) - start) // most * most
            found[numbers] = numbers[start]
        return found

    def _sorted(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in range(_PARTS):
            rows = np.fromfile(self._folder / f"{part:02d}", "<u8").reshape(-1, 2)
            order = np.argsort(rows[:, 0], kind="stable")
            yield rows[order, 0], rows[order, 1]

    def _write(self) -> None:
        marks = np.frombuffer(bytes(self._held), "<u8")
        numbers = np.arange(self._written, self._written + len(marks), dtype=np.uint64)
        rows, parts = np.stack([marks, numbers], 1), marks >> np.uint64(58)
        for part, file in enumerate(self._files):
            rows[parts == part].astype("<u8").tofile(file)
        self._written += len(marks)
        self._held.clear()
