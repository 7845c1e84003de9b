"""Puts results that come in any order back in order: those that wait are in memory, beyond a limit on disk."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import ExitStack
from tempfile import TemporaryFile, gettempdir
from typing import IO, Generic, TypeVar

Result = TypeVar("Result")


class ReorderBuffer(Generic[Result]):
    """Passes numbered results on to `emit` in the order 0, 1, 2, ...: a context manager.

    Waiting results are kept in memory up to `memory` bytes, and on disk beyond.
    """

    def __init__(self, emit: Callable[[Result], None], memory: int = 64 << 20) -> None:
        self._emit, self._memory = emit, memory
        self._next = 0
        self._in_memory: dict[int, tuple[Result, int]] = {}
        self._bytes = 0
        self._on_disk: dict[int, tuple[int, int]] = {}
        self._end = 0
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ReorderBuffer[Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, number: int, result: Result, size: int) -> None:
        """Add a result of about `size` bytes, which can be pickled, and pass on those whose turn it is."""
        if number != self._next:
            return self._keep(number, result, size)
        self._emit(result)
        self._next += 1
        while self._next in self._in_memory or self._next in self._on_disk:
            self._emit(self._take(self._next))
            self._next += 1
        return None

    def _keep(self, number: int, result: Result, size: int) -> None:
        if self._bytes + size <= self._memory:
            self._in_memory[number] = (result, size)
            self._bytes += size
            return
        data = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
        try:
            if self._file is None:
                file: IO[bytes] = TemporaryFile(prefix="lavic-reorder-")  # noqa: SIM115 (closed on exit)
                self._file = self._stack.enter_context(file)
            self._file.seek(self._end)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            # The message about the output folder would hide that another disk is full.
            raise OSError(error.errno, f"{error.strerror} in {gettempdir()}, the folder of TMPDIR") from None
        self._on_disk[number] = (self._end, len(data))
        self._end += len(data)

    def _take(self, number: int) -> Result:
        if number in self._in_memory:
            result, size = self._in_memory.pop(number)
            self._bytes -= size
            return result
        assert self._file is not None
        start, length = self._on_disk.pop(number)
        self._file.seek(start)
        result = pickle.loads(self._file.read(length))
        if not self._on_disk:
            self._file.truncate(0)
            self._end = 0
        return result
