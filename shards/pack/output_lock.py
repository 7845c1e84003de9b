"""Whose a set's folder is: one crawl writes to it, and what an earlier one left running notices that it may no more."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lavic.errors import LavicError, first_line
from lavic.shards.plan.crawl_plan import FOLDER as PLAN
from lavic.shards.plan.photo_tasks import REJECTED
from lavic.storage.atomic import sweep, write_whole
from lavic.storage.file_lock import Lock
from lavic.storage.output_folder import FILE as LOCK
from lavic.storage.output_folder import hold
from lavic.storage.paths import is_remote, sizes, storage_errors

FILE = ".owner"


class Superseded(Exception):
    """Another crawl has taken the folder over."""


@contextmanager
def owned(folder: Path) -> Iterator[str]:
    """Take a folder over, clear what killed crawls left in it, and give the name under which it is held.

    On a file system a lock keeps other commands out. Object stores, and some file systems, have no lock: there the last
    to come has the folder, and so it is for workers of a driver that was killed, which may outlive it: whoever writes
    asks `check` first. A folder in which nothing was made, since the input was refused, is left as it was.

    Raises:
        ConfigError: Another command holds the folder, or it cannot be written to.
        LavicError: The disk is full.
    """
    name = uuid.uuid4().hex
    if is_remote(folder):
        _claim(folder, name)
        try:
            yield name
        finally:
            with suppress(*storage_errors()):
                if sizes(folder).keys() <= {FILE, REJECTED} and not (folder / PLAN).exists():
                    (folder / FILE).unlink(missing_ok=True)
        return
    with hold(folder) as lock:
        try:
            _claim(folder, name)
            for inner in (folder, folder / PLAN):
                sweep(inner)
            yield name
            # Workers that were killed on the way left theirs too.
            sweep(folder)
        finally:
            with suppress(OSError):
                _remove_if_empty(folder, lock)


def _remove_if_empty(folder: Path, lock: Lock) -> None:
    """Remove what `owned` has made where nothing came of it, or only the list of records that were refused."""
    with suppress(OSError):  # not there, or not empty
        (folder / PLAN).rmdir()
    if {path.name for path in folder.iterdir()} <= {FILE, LOCK, REJECTED}:
        (folder / FILE).unlink(missing_ok=True)
        lock.remove()


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
