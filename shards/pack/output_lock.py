"""Exclusive use of a set's folder: one crawl writes to it, and workers of an earlier one stop."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lavic.errors import LavicError, first_line
from lavic.shards.plan.crawl_plan import FOLDER as PLAN
from lavic.shards.plan.photo_tasks import REJECTED
from lavic.storage.atomic import atomic_write, remove_partial_files
from lavic.storage.file_lock import FileLock
from lavic.storage.output_folder import FILE as LOCK
from lavic.storage.output_folder import lock_output_folder
from lavic.storage.paths import is_remote, sizes, storage_errors

FILE = ".owner"


class Superseded(Exception):
    """Another crawl has taken the folder over."""


@contextmanager
def lock_output(folder: Path) -> Iterator[str]:
    """Take a folder over and clear what killed crawls left in it; gives the name of its new owner.

    On a file system a lock keeps other commands out. Object stores, and some file systems, have no locks: there the
    last command has the folder. Workers may outlive a driver that was killed, so they call `check_owner` before they
    write. A folder in which nothing was made, because the input was refused, stays as it was.

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
    with lock_output_folder(folder) as lock:
        try:
            _claim(folder, name)
            for inner in (folder, folder / PLAN):
                remove_partial_files(inner)
            yield name
            # Workers that were killed meanwhile leave files too.
            remove_partial_files(folder)
        finally:
            with suppress(OSError):
                _remove_if_empty(folder, lock)


def _remove_if_empty(folder: Path, lock: FileLock) -> None:
    """Remove what `lock_output` has made if nothing else is there, except the list of refused records."""
    with suppress(OSError):  # not there, or not empty
        (folder / PLAN).rmdir()
    if {path.name for path in folder.iterdir()} <= {FILE, LOCK, REJECTED}:
        (folder / FILE).unlink(missing_ok=True)
        lock.remove()


def check_owner(folder: Path, name: str) -> None:
    """Check that the folder still has this owner.

    Raises:
        Superseded: It has not.
    """
    if (folder / FILE).read_text("utf-8") != name:
        raise Superseded(f"{folder}: another crawl has taken this folder over")


def unwritable(folder: Path, reason: str) -> LavicError:
    """The one line for a folder that cannot be written to."""
    return LavicError(f"{folder}: cannot be written to ({reason}); fix that and run the same command again to continue")


def _claim(folder: Path, name: str) -> None:
    try:
        atomic_write(folder / FILE, name)
    except storage_errors() as error:
        raise unwritable(folder, first_line(error)) from None
