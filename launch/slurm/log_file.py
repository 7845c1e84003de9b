"""Reads the last lines of a log, and follows a log that is being written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

TAIL_BYTES = 1 << 16
"""Read from the end of a file whose last lines are wanted."""
_PAUSE_S = 0.5


def read_tail(path: Path) -> list[bytes]:
    """The lines in the last `TAIL_BYTES` of a file, the first of them perhaps cut; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().splitlines()
    except OSError:
        return []


def follow(path: Path, offset: int, is_active: Callable[[], bool], *, poll_s: float) -> Iterator[bytes]:
    """Yields what is appended to a file after `offset`, until its writer has ended; the file may not exist yet.

    Every `poll_s` seconds `is_active` tells whether more may be written.
    """
    checked_at, active = time.monotonic(), True
    while True:
        if path.is_file():
            with path.open("rb") as file:
                file.seek(offset)
                yield file.read()
                offset = file.tell()
        if not active:
            return
        if time.monotonic() - checked_at >= poll_s:
            active, checked_at = is_active(), time.monotonic()  # once it has ended, one more read gets its last lines
        time.sleep(_PAUSE_S)
