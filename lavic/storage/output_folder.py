"""The output folder of a command: tried before the work begins, and kept for one command at a time."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lavic.errors import ConfigError, LavicError, first_line
from lavic.storage.atomic import sweep, written_aside
from lavic.storage.file_lock import Lock

FILE = ".lock"
_DYING_S = 1.0
"""Seconds to wait for a killed process, which the kernel is still taking down."""
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE})
"""Errors that may be gone at the next try, with the same settings."""

log = logging.getLogger(__name__)


@contextmanager
def hold(folder: Path, *, wait_s: float = _DYING_S, alone: bool = True) -> Iterator[Lock]:
    """Make a folder, see that it can be written to, and keep other commands out until the block ends.

    What a killed command left half-written is removed. Where nothing came of it, because the input was refused, the
    folder and the parents made for it are removed again.

    Args:
        folder: On a file system. Some file systems have no locks: there nobody is kept out, and a warning says so.
        wait_s: How long to wait for another command to end.
        alone: Whether nobody writes to the folder but who holds it; False where ranks write that do not wait for it.

    Raises:
        ConfigError: The folder cannot be written to, or another command holds it.
        LavicError: The disk is full.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = Lock(folder / FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = lock.take(wait_s)
        if free:
            try_to_write(folder)
            if alone and not lock.unsupported:
                sweep(folder)
    except OSError as error:
        raise unwritable(folder, error) from None
    if not free:
        raise ConfigError(
            f"{folder}: another lavic command is writing to this folder; wait for it or use another folder"
        )
    if lock.unsupported:
        log.warning(
            "%s: this file system has no file locks (%s), so nothing keeps a second command out; run one at a time",
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
                    for path in made:
                        path.rmdir()


def try_to_write(folder: Path) -> None:
    """Write a file into a folder and remove it. Raises OSError."""
    probe = folder / "writable"
    with suppress(_Written), written_aside(probe) as file:
        file.write(b"\0")
        file.flush()
        raise _Written


def unwritable(folder: Path, error: BaseException) -> LavicError:
    """The one line for a folder that cannot be written to."""
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or first_line(error)
    if number in _PASSING:
        return LavicError(f"{folder}: cannot be written to ({reason}): make room, then run the same command again")
    if number in (errno.ENOTDIR, errno.EEXIST):
        reason = "a file is where a folder is needed"
    return ConfigError(f"{folder}: cannot be written to ({reason}); use another folder, or change its permissions")


class _Written(Exception):
    """Ends `try_to_write` without a file being put in place."""
