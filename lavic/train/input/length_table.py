"""The lengths of all samples of a set, counted once per machine instead of by each rank in each epoch.

The micro-batches of a step depend on the lengths of all its samples, including those of other ranks. With the table, a
rank need not read and tokenize samples that it does not train on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from lavic.storage.file_lock import FileLock

CHUNK = 256
"""Adjacent samples that are counted together; the order of training keeps them near each other."""
COLUMNS = 3
"""Numbers per sample."""
MAX_VALUE = 2**16 - 1
"""Largest number."""
_BYTES = 2 * (COLUMNS + 1)
_MAX_UNUSED_S = 30 * 24 * 3600.0

log = logging.getLogger(__name__)


class LengthTable:
    """Small numbers for each sample of a set, in a file that all processes of a machine share.

    The file is sparse: a process fills a chunk when one of its samples is first needed, while the others fill other
    chunks or wait. A chunk that a killed process did not write is counted again.

    Args:
        file: On a local disk; its name identifies the set and the tokenization.
        samples: Number of samples.
        count: Returns `COLUMNS` numbers, from 0 to `MAX_VALUE`, for each sample of a range.
    """

    def __init__(self, file: Path, samples: int, count: Callable[[range], Sequence[Sequence[int]]]) -> None:
        self.file, self.samples = file, samples
        self._count = count
        self._rows: np.ndarray | None = None
        self._failed = False

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The numbers of samples.

        Args:
            indices: int64 [n].

        Returns:
            int64 [n, COLUMNS].
        """
        rows = None if self._failed else self._look_up(indices)
        if rows is None:
            rows = np.array([self._count(range(index, index + 1))[0] for index in indices.tolist()])
        return rows.astype(np.int64).reshape(len(indices), COLUMNS)

    def _look_up(self, indices: np.ndarray) -> np.ndarray | None:
        try:
            if self._rows is None:
                self._rows = self._open()
            chunks = [chunk for chunk in np.unique(indices // CHUNK).tolist() if not self._is_filled(chunk)]
            if chunks:
                # Ranks need the same chunks at the same time, so each starts at another one.
                start = os.getpid() % len(chunks)
                for chunk in chunks[start:] + chunks[:start]:
                    self._fill(chunk, wait=False)
                for chunk in chunks:
                    self._fill(chunk, wait=True)
            return self._rows[indices, :COLUMNS]
        except OSError as error:
            log.warning("%s: cannot be written to (%s): each rank counts the tokens itself", self.file, error)
            self._failed = True
            return None

    def _open(self) -> np.ndarray:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        for other in self.file.parent.glob(f"*{self.file.suffix}"):
            with suppress(OSError):
                if other != self.file and time.time() - other.stat().st_mtime > _MAX_UNUSED_S:
                    other.unlink()
        with self.file.open("ab") as table:
            table.truncate(self.samples * _BYTES)
        os.utime(self.file)
        return np.memmap(self.file, "<u2", "r", shape=(self.samples, COLUMNS + 1))

    def _range(self, chunk: int) -> range:
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.samples))

    def _is_filled(self, chunk: int) -> bool:
        assert self._rows is not None
        rows = self._range(chunk)
        return bool(self._rows[rows.start : rows.stop, COLUMNS].all())

    def _fill(self, chunk: int, *, wait: bool) -> None:
        if self._is_filled(chunk):
            return
        with FileLock(self.file.with_name(f".{self.file.stem}.{chunk}.lock")) as lock:
            while not lock.acquire(1.0 if wait else 0.0):
                if not wait:
                    return
            if not self._is_filled(chunk):
                rows = self._range(chunk)
                counted = np.ones((len(rows), COLUMNS + 1), "<u2")
                counted[:, :COLUMNS] = np.minimum(self._count(rows), MAX_VALUE)
                # Not through the memory map: on a full disk that would kill the process.
                file = os.open(self.file, os.O_WRONLY)
                try:
                    os.pwrite(file, counted.tobytes(), rows.start * _BYTES)
                finally:
                    os.close(file)
            if not lock.unsupported:
                lock.remove()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_rows": None}
