"""The output folder of a command: checked before the work begins, and locked for one command at a time."""

from __future__ import annotations

import errno
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lavic.errors import ConfigError, LavicError, first_line
from lavic.storage.atomic import remove_partial_files
from lavic.storage.file_lock import FileLock

FILE = ".lock"
_KILLED_S = 1.0
"""Seconds to wait for the end of a killed process."""
_TRANSIENT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE})
"""Errors that may be gone when the same command runs again."""

log = logging.getLogger(__name__)


@contextmanager
def lock_output_folder(folder: Path, *, timeout_s: float = _KILLED_S, exclusive: bool = True) -> Iterator[FileLock]:
    """Creates a folder, checks that it is writable, and locks it for the duration of a block.

    Partial files of a killed command are removed. If the block leaves the folder empty, for example because the input
    was refused, the folder and its new parents are removed.

    Args:
        folder: On a file system; if that has no locks, a warning is logged.
        timeout_s: How long to wait for another command to end.
        exclusive: Whether only the lock's holder writes to the folder; False if other ranks write too.

    Raises:
        ConfigError: The folder is not writable, or another command has locked it.
        LavicError: The disk is full.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        acquired = lock.acquire(timeout_s)
        if acquired:
            check_writable(folder)
            if exclusive and not lock.unsupported:
                remove_partial_files(folder)
    except OSError as error:
        raise not_writable(folder, error) from None
    if not acquired:
        raise ConfigError(
            f"{folder}: another lavic command is writing to this folder; wait for it or use another folder"
        )
    if lock.unsupported:
        log.warning(
            "%s: this file system has no file locks (%s): run only one command at a time on this folder",
            folder,
            lock.unsupported,
        )
    with lock:
        try:
            yield lock
        finally:
            with suppress(OSError):
                if {path.name for path in folder.iterdir()} <= {FILE}:
                    lock.remove()
                    for path in created:
                        path.rmdir()


def check_writable(folder: Path) -> None:
    """Writes a temporary file into a folder. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0")
        file.flush()


def not_writable(folder: Path, error: BaseException) -> LavicError:
    """The error for a folder that cannot be written to."""
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or first_line(error)
    if number in _TRANSIENT or number is None:  # None: of an object store
        advice = "fix that" if number is None else "make room"
        return LavicError(f"{folder}: cannot be written to ({reason}): {advice}, then run the same command again")
    if number in (errno.ENOTDIR, errno.EEXIST):
        reason = "a file is where a folder is needed"
    return ConfigError(f"{folder}: cannot be written to ({reason}); use another folder, or change its permissions")
