"""Tasks of several hosts: how many run, who waits, and what is left over."""

from __future__ import annotations

import asyncio

import pytest

from lavic.shards.pack.fetch_order import WINDOW, run_by_host


def test_a_host_that_waits_holds_up_no_other_however_many_tasks_it_has() -> None:
    async def run() -> None:
        gate, done, started = asyncio.Event(), [], []

        async def process(number: int) -> None:
            started.append(number)
            if number < 2 * WINDOW:
                await gate.wait()
            done.append(number)

        def host_of(number: int) -> str:
            return "slow" if number < 2 * WINDOW else "quick"

        running = asyncio.create_task(run_by_host(range(2 * WINDOW + 500), process, host_of))
        while len(done) < 500:
            await asyncio.sleep(0)
        assert len(started) == WINDOW + 500 and done == list(range(2 * WINDOW, 2 * WINDOW + 500))
        gate.set()
        assert await running == [] and done[500:] == list(range(2 * WINDOW))

    asyncio.run(run())


def test_what_is_not_done_at_a_stop_is_returned() -> None:
    async def run() -> None:
        ended = []

        async def process(number: int) -> None:
            try:
                if number % 2:
                    await asyncio.Event().wait()
            finally:
                ended.append(number)

        numbers = range(2 * WINDOW + 100)
        left = await run_by_host(numbers, process, lambda number: "x", stop=lambda: len(ended) >= WINDOW // 2)
        # Tasks that ran were cancelled, and those that had not begun are left too.
        assert set(ended) >= set(range(0, WINDOW, 2)) and set(left) >= set(range(1, WINDOW, 2))
        assert left == sorted(set(numbers) - {number for number in ended if number % 2 == 0})

    asyncio.run(run())


def test_a_task_that_fails_ends_all() -> None:
    async def process(number: int) -> None:
        if number == 3:
            raise OSError("disk full")
        await asyncio.Event().wait()

    with pytest.raises(OSError, match="disk full"):
        asyncio.run(run_by_host(range(10), process, lambda number: "x"))
