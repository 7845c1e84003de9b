"""Whose a set's folder is: one crawl writes to it, and what an earlier one left running notices that it may no more."""

from __future__ import annotations

import fcntl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lavic.data.atomic import sweep, write_whole
from lavic.data.place import is_remote, storage_errors
from lavic.errors import ConfigError, LavicError, first_line

FILE = ".owner"
_LOCK = ".lock"


class Superseded(Exception):
    """Another crawl has taken the folder over."""


@contextmanager
def owned(folder: Path) -> Iterator[str]:
    """Take a folder over, clear what killed crawls left in it, and give the name under which it is held.

    On a file system a lock keeps a second crawl out. An object store has no lock: there the last to come has the
    folder, and so it is for workers of a driver that was killed, which may outlive it: whoever writes asks `check`
    first.

    Raises:
        ConfigError: Another crawl holds the lock.
        LavicError: The folder cannot be written to.
    """
    name = uuid.uuid4().hex
    if is_remote(folder):
        _claim(folder, name)
        yield name
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise unwritable(folder, first_line(error)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{folder}: another crawl is writing to this folder; wait for it or use another --out"
            ) from None
        _claim(folder, name)
        for inner in (folder, folder / "plan"):
            sweep(inner)
        yield name
        # Workers that were killed on the way left theirs too.
        sweep(folder)


def check(folder: Path, name: str) -> None:
    """See that the folder is still held under this name.

    Raises:
        Superseded: It is not.
    """
    if (folder / FILE).read_text("utf-8") != name:
        raise Superseded(f"{folder}: another crawl has taken this folder over")


def unwritable(folder: Path, reason: str) -> LavicError:
    """The one line for a folder that cannot be written to."""
    return LavicError(
        f"{folder}: cannot be written to ({reason}); mend that and run the same command again, it goes on"
    )


def _claim(folder: Path, name: str) -> None:
    try:
        write_whole(folder / FILE, name)
    except storage_errors() as error:
        raise unwritable(folder, first_line(error)) from None
