"""A lock on a file: held by one process until it lets go or dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import weakref
from pathlib import Path
from types import TracebackType

_held: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """One process's claim on a file, which stays where it is.

    The kernel lets go when the process ends. A forked child (a data loader's worker) would share the claim and outlive
    a killed parent by seconds: it drops its copy at birth. Some file systems have no locks (NFS and Lustre, by how they
    are mounted): there nobody is kept out.

    Attributes:
        path: The file.
        unsupported: Why the file system cannot lock, or empty where it can: then nothing is known of other processes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unsupported = ""
        self._file = -1

    def take(self, patience_s: float = 0.0) -> bool:
        """Takes the lock, waiting for another process at most so long; returns whether it is ours (or not known).

        Raises:
            OSError: The file cannot be opened.
        """
        until = time.monotonic() + patience_s
        while True:
            if self._file < 0:
                self._file = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o644)
                _held.add(self)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until:
                    self.release()
                    return False
                time.sleep(0.02)
                continue
            except OSError as error:
                self.unsupported = error.strerror or str(error)
                return True
            if self._is_current():
                return True
            # The last holder has removed the file: a lock on what is left of it keeps nobody out.
            self.release()

    def release(self) -> None:
        """Lets go; without the lock it does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Removes the file, then lets go."""
        self.path.unlink(missing_ok=True)
        self.release()

    def _is_current(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        return False

    def __del__(self) -> None:
        self.release()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def is_held(path: Path) -> bool | None:
    """Whether a process holds the lock on a file; None where that cannot be told."""
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
