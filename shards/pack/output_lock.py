"""Exclusive use of a set's folder: one crawl writes to it, and workers of an earlier one stop."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lavic.shards.plan.crawl_plan import FOLDER as PLAN
from lavic.shards.plan.photo_tasks import REJECTED
from lavic.storage.atomic import atomic_write, remove_partial_files
from lavic.storage.file_lock import FileLock
from lavic.storage.output_folder import FILE as LOCK
from lavic.storage.output_folder import lock_output_folder, not_writable
from lavic.storage.paths import file_sizes, is_remote, storage_errors

FILE = ".owner"


class Superseded(Exception):
    """Another crawl owns the folder."""


@contextmanager
def lock_output(folder: Path) -> Iterator[str]:
    """Locks a folder, and removes what killed crawls left in it; yields the name of its new owner.

    Object stores, and some file systems, have no locks: there, the last command owns the folder. Workers may outlive a
    killed driver, so they call `check_owner` before they write. If the block writes nothing, because the input was
    refused, the folder is left unchanged.

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
                if file_sizes(folder).keys() <= {FILE, REJECTED} and not (folder / PLAN).exists():
                    (folder / FILE).unlink(missing_ok=True)
        return
    with lock_output_folder(folder) as lock:
        try:
            _claim(folder, name)
            for inner in (folder, folder / PLAN):
                remove_partial_files(inner)
            yield name
            # Killed workers leave partial files too.
            remove_partial_files(folder)
        finally:
            with suppress(OSError):
                _remove_if_empty(folder, lock)


def _remove_if_empty(folder: Path, lock: FileLock) -> None:
    """Removes the files of `lock_output` if nothing else is there, except the list of refused records."""
    with suppress(OSError):  # not there, or not empty
        (folder / PLAN).rmdir()
    if {path.name for path in folder.iterdir()} <= {FILE, LOCK, REJECTED}:
        (folder / FILE).unlink(missing_ok=True)
        lock.remove()


def check_owner(folder: Path, name: str) -> None:
    """Checks that the folder still has this owner.

    Raises:
        Superseded: It has another one.
    """
    if (folder / FILE).read_text("utf-8") != name:
        raise Superseded(f"{folder}: another crawl has taken over this folder")


def _claim(folder: Path, name: str) -> None:
    try:
        atomic_write(folder / FILE, name)
    except storage_errors() as error:
        raise not_writable(folder, error) from None
