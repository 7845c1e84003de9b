"""Tasks of several hosts: how many run, who waits, and what is left over."""

from __future__ import annotations

import asyncio

import pytest

from lavic.shards.pack.fetch_order import WINDOW, Schedule


def test_a_host_that_waits_holds_up_no_other_however_many_tasks_it_has() -> None:
    async def run() -> None:
        gate, done = asyncio.Event(), []

        async def make(number: int) -> None:
            if number < 2 * WINDOW:
                await gate.wait()
            done.append(number)

        schedule = Schedule(make, lambda number: "slow" if number < 2 * WINDOW else "quick")
        running = asyncio.create_task(schedule.run(range(2 * WINDOW + 500)))
        while len(done) < 500:
            await asyncio.sleep(0)
        assert len(schedule._running) == WINDOW and done == list(range(2 * WINDOW, 2 * WINDOW + 500))
        gate.set()
        assert await running == [] and done[500:] == list(range(2 * WINDOW))

    asyncio.run(run())


def test_what_is_not_done_when_it_is_to_stop_is_told() -> None:
    async def run() -> None:
        ended = []

        async def make(number: int) -> None:
            try:
                if number % 2:
                    await asyncio.Event().wait()
            finally:
                ended.append(number)

        schedule = Schedule(make, lambda number: "x")
        left = await schedule.run(range(2 * WINDOW + 100), stop=lambda: len(ended) >= WINDOW // 2)
        # Whatever ran was ended, and what had not begun is left too.
        assert set(ended) >= set(range(0, WINDOW, 2)) and set(left) >= set(range(1, WINDOW, 2))
        assert left == sorted(set(range(2 * WINDOW + 100)) - {number for number in ended if number % 2 == 0})

    asyncio.run(run())


def test_a_task_that_fails_ends_all() -> None:
    async def make(number: int) -> None:
        if number == 3:
            raise OSError("disk full")
        await asyncio.Event().wait()

    with pytest.raises(OSError, match="disk full"):
        asyncio.run(Schedule(make, lambda number: "x").run(range(10)))
