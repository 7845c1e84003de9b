"""Runs the tasks of a shard's photos: many of each host at once, so that no host waits for another."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

WINDOW = 1024
"""Tasks of one host that run at once. Most of them wait for a permit, which costs little. If the first of them fail,
the host is tried with the others."""
_POLL_S = 0.5
"""Seconds between two calls of `stop`."""


async def run_by_host(
    numbers: Sequence[int],
    run_task: Callable[[int], Coroutine[Any, Any, None]],
    host_of: Callable[[int], str],
    stop: Callable[[], bool] | None = None,
) -> list[int]:
    """Run the task of each number; those of each host start in this order. What a task raises is raised here.

    `stop` is called periodically; True cancels the tasks that are not done. Returns the numbers of these.
    """
    windows: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(WINDOW))

    async def run(number: int) -> None:
        async with windows[host_of(number)]:
            await run_task(number)

    pending = {asyncio.create_task(run(number)): number for number in numbers}
    try:
        while pending and not (stop and stop()):
            done, _ = await asyncio.wait(
                pending, timeout=_POLL_S if stop else None, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                del pending[task]
                task.result()
        return sorted(pending.values())
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
