"""The photos of a shard as tasks: many of each host at a time, so that no host has to wait for another."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

WINDOW = 1024
"""Tasks of one host that run at a time. Most of them wait for the host's leave, and cost little; a host that fails for
those in front is tried with those behind them."""
_LOOK_S = 0.5
"""Seconds between two looks whether to stop."""


class Schedule:
    """Runs numbered tasks.

    Args:
        make: The task of a number.
        host: Whose task a number is.
    """

    def __init__(self, make: Callable[[int], Coroutine[Any, Any, None]], host: Callable[[int], str]) -> None:
        self._make, self._host = make, host
        self._running: dict[int, asyncio.Task[None]] = {}
        self._count: Counter[str] = Counter()
        self._parked: dict[str, deque[int]] = {}
        self._left = 0

    async def run(self, numbers: Sequence[int], stop: Callable[[], bool] | None = None) -> list[int]:
        """Run the tasks of all numbers, those of each host begun in this order.

        Args:
            numbers: Each once.
            stop: Asked now and then whether to end before all are done.

        Returns:
            The numbers that are not done. What a task raises is raised here.
        """
        self._left = len(numbers)
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            for number in numbers:
                host = self._host(number)
                if self._count[host] < WINDOW:
                    self._count[host] += 1
                    self._begin(number, host)
                else:
                    self._parked.setdefault(host, deque()).append(number)
            while self._left and not (stop and stop()):
                await asyncio.wait([self._end], timeout=_LOOK_S if stop else None)
                if self._end.done():
                    self._end.result()
            return sorted([*self._running, *(number for parked in self._parked.values() for number in parked)])
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _begin(self, number: int, host: str) -> None:
        self._running[number] = asyncio.create_task(self._one(number, host))

    async def _one(self, number: int, host: str) -> None:
        try:
            await self._make(number)
        except Exception as error:
            if not self._end.done():
                self._end.set_exception(error)
            return
        del self._running[number]
        self._left -= 1
        if parked := self._parked.get(host):
            self._begin(parked.popleft(), host)
        else:
            self._count[host] -= 1
        if not self._left and not self._end.done():
            self._end.set_result(None)
