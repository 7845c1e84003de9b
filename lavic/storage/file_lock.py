"""A lock on a file (flock): held by one process until it releases it or ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import weakref
from pathlib import Path

_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


class FileLock:
    """An exclusive lock on a file: a context manager that releases it. The file stays.

    The kernel releases the lock when the process ends. A forked child (a data loader's worker) would share it and
    outlive a killed parent by seconds, so a child drops its copy at once. Some file systems have no locks (NFS and
    Lustre, depending on the mount options): there `acquire` always succeeds.

    Attributes:
        path: The file.
        unsupported: Why the file system cannot lock; empty where it can.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unsupported = ""
        self._file = -1

    def acquire(self, timeout_s: float = 0.0) -> bool:
        """Waits for the lock at most `timeout_s`; returns whether this process has it (or the file system cannot lock).

        Raises:
            OSError: The file cannot be opened.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if self._file < 0:
                self._file = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o644)
                _held.add(self)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    self.release()
                    return False
                time.sleep(0.02)
                continue
            except OSError as error:
                self.unsupported = error.strerror or str(error)
                return True
            if self._is_current():
                return True
            # The previous holder removed the file: a lock on a removed file excludes no other process.
            self.release()

    def release(self) -> None:
        """Releases the lock; does nothing without it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Removes the file and releases the lock."""
        self.path.unlink(missing_ok=True)
        self.release()

    def _is_current(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        return False

    def __del__(self) -> None:
        self.release()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_held(path: Path) -> bool | None:
    """Whether a process holds the lock on a file; None where that is unknown."""
    try:
        with contextlib.closing(path.open("rb+")) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return None


def _drop_copies() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_drop_copies)
