"""Files that are read by offset: a bounded number stays open, those that were used last."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path

MAX_OPEN = 96
"""Files that a process keeps open, for all readers."""


class OpenFile:
    """A file opened for reading, which is closed with its last reference.

    Attributes:
        size: Bytes.
        stamp: Changes when another file replaces this one.
    """

    def __init__(self, path: Path) -> None:
        self._number = os.open(path, os.O_RDONLY)
        status = os.fstat(self._number)
        self.size = status.st_size
        self.stamp = (status.st_ino, status.st_size, status.st_mtime_ns)

    def read(self, start: int, end: int) -> bytes:
        """The bytes between two offsets; fewer where the file ends before."""
        return os.pread(self._number, end - start, start)

    # At interpreter exit, the names of modules may be None before this is called.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "_number"):
            close(self._number)


class OpenFiles:
    """An LRU cache of open files.

    It is thread-safe; the lock is reentrant, because a destructor may run while it is held. A forked child may use its
    parent's files: reads by offset share no file position.
    """

    def __init__(self, max_open: int = MAX_OPEN) -> None:
        self.max_open = max_open
        self._open: OrderedDict[Hashable, OpenFile] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: Hashable, path: Callable[[], Path]) -> OpenFile:
        """The file with a key, opened where it is not open. A file that has been replaced needs another key.

        `path` is called only to open it. Raises OSError where that fails.
        """
        with self._lock:
            if file := self._open.get(key):
                self._open.move_to_end(key)
                return file
        file = OpenFile(path())
        with self._lock:
            file = self._open.setdefault(key, file)
            self._open.move_to_end(key)
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)
        return file

    def drop(self, owner: object) -> None:
        """Removes the files whose key is a tuple that begins with `owner`."""
        with self._lock:
            for key in list(self._open):
                if isinstance(key, tuple) and key[0] is owner:
                    self._open.pop(key, None)

    def after_fork(self) -> None:
        """Replaces the lock, which another thread may have held during the fork."""
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._open)


FILES = OpenFiles()
"""The files of this process."""
os.register_at_fork(after_in_child=FILES.after_fork)
