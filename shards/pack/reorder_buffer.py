"""Results that come in any order, given on in theirs: what has to wait is in memory, and beyond a bound on the disk."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import ExitStack
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Generic, TypeVar

Result = TypeVar("Result")


class ReorderBuffer(Generic[Result]):
    """Takes in numbered results, and gives them on in the order 0, 1, 2, ...; use it as a context.

    Args:
        give: Takes a result whose turn it is.
        memory: Bytes of results that are held in memory.
    """

    def __init__(self, give: Callable[[Result], None], memory: int = 64 << 20) -> None:
        self._give, self._memory = give, memory
        self._next = 0
        self._held: dict[int, tuple[Result, int]] = {}
        self._bytes = 0
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ReorderBuffer[Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, number: int, result: Result, size: int) -> None:
        """Take one in, and give on those whose turn has come.

        Args:
            number: Its place.
            result: Anything that can be pickled.
            size: Its bytes, about.
        """
        if number != self._next:
            return self._keep(number, result, size)
        self._give(result)
        self._next += 1
        while self._next in self._held or self._next in self._places:
            self._give(self._take(self._next))
            self._next += 1
        return None

    def _keep(self, number: int, result: Result, size: int) -> None:
        if self._bytes + size <= self._memory:
            self._held[number] = (result, size)
            self._bytes += size
            return
        if self._file is None:
            file: IO[bytes] = TemporaryFile(prefix="lavic-reorder-")  # noqa: SIM115 (closed on exit)
            self._file = self._stack.enter_context(file)
        data = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
        self._file.seek(self._end)
        self._file.write(data)
        self._places[number] = (self._end, len(data))
        self._end += len(data)

    def _take(self, number: int) -> Result:
        if number in self._held:
            result, size = self._held.pop(number)
            self._bytes -= size
            return result
        assert self._file is not None
        start, length = self._places.pop(number)
        self._file.seek(start)
        result = pickle.loads(self._file.read(length))
        if not self._places:
            self._file.truncate(0)
            self._end = 0
        return result
