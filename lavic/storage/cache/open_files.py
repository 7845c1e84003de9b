"""Files that are read here and there, by offset: the last ones stay open, few of them however many there are."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path

MOST = 96
"""Files that a process keeps open, all readers together."""


class OpenFile:
    """A file opened for reading. It is closed when the last who holds it lets go of it.

    Attributes:
        size: Bytes.
        stamp: Another one tells that another file has taken its place.
    """

    def __init__(self, path: Path) -> None:
        self._number = os.open(path, os.O_RDONLY)
        status = os.fstat(self._number)
        self.size = status.st_size
        self.stamp = (status.st_ino, status.st_size, status.st_mtime_ns)

    def read(self, start: int, end: int) -> bytes:
        """The bytes between two offsets; fewer where the file ends before."""
        return os.pread(self._number, end - start, start)

    # when the interpreter ends, modules may be gone before this is called
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "_number"):
            close(self._number)


class OpenFiles:
    """The files that were read last.

    Threads may share it; the lock can be taken twice, because a destructor may run while it is held. A forked child may
    go on with its parent's files: reading by offset moves nothing that they share.
    """

    def __init__(self, most: int = MOST) -> None:
        """Describes it; `most` files stay open."""
        self.most = most
        self._open: OrderedDict[Hashable, OpenFile] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: Hashable, path: Callable[[], Path]) -> OpenFile:
        """A file, opened where it is not.

        Args:
            key: What it is known by; a file that has been replaced needs another.
            path: Says where it is; asked only when it is opened.

        Raises:
            OSError: It cannot be opened.
        """
        with self._lock:
            if file := self._open.get(key):
                self._open.move_to_end(key)
                return file
        file = OpenFile(path())
        with self._lock:
            file = self._open.setdefault(key, file)
            self._open.move_to_end(key)
            while len(self._open) > self.most:
                self._open.popitem(last=False)
        return file

    def drop(self, owner: object) -> None:
        """Lets go of the files whose key is a tuple that begins with `owner`."""
        with self._lock:
            for key in list(self._open):
                if isinstance(key, tuple) and key[0] is owner:
                    self._open.pop(key, None)

    def after_fork(self) -> None:
        """Another thread may have held the lock at that moment."""
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._open)


FILES = OpenFiles()
"""Those of this process."""
os.register_at_fork(after_in_child=FILES.after_fork)
