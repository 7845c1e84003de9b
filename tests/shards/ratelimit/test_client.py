"""A worker's side of a host's budget, between what it is granted and what it has just seen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from lavic.shards.ratelimit.client import HostClosed, Lane
from lavic.shards.ratelimit.host_limiter import Grant


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 20))

    run.__name__ = test.__name__
    return run


def free(version: int = 0) -> Grant:
    return Grant(version=version, connections=99, free=True)


@in_loop
async def test_slots_at_hand_are_not_asked_for_again() -> None:
    asked = []
    lane = Lane(lambda: asked.append(1))
    waiting = [asyncio.create_task(lane.enter()) for _ in range(3)]
    await asyncio.sleep(0)
    assert asked and lane.report().wanted == 3
    lane.take(Grant(version=0, connections=9, slots=3, interval=1000.0))
    await asyncio.sleep(0.01)
    report = lane.report()
    assert [one.done() for one in waiting] == [True, False, False]
    assert report.wanted == 0 and report.sent == 1 and report.in_flight == 1
    for one in waiting:
        one.cancel()


@in_loop
async def test_what_was_granted_before_the_host_complained_does_not_count() -> None:
    lane = Lane(lambda: None)
    lane.take(free())
    version = await lane.enter()
    lane.report()
    lane.leave(version, "throttled", retry_after=1000.0)
    lane.take(free())
    waiting = asyncio.create_task(lane.enter())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    report = lane.report()
    assert report.throttled and report.retry_after == 1000.0
    lane.take(Grant(version=1, connections=99, closed=1000.0, give_up=True, kind="throttled", reason="rest"))
    with pytest.raises(HostClosed, match="rest"):
        await waiting


@in_loop
async def test_what_was_sent_before_a_change_says_nothing_about_it() -> None:
    lane = Lane(lambda: None)
    lane.take(free(0))
    before = await lane.enter()
    lane.take(free(1))
    after = await lane.enter()
    lane.leave(before, "failed", "timeout", "slow")
    lane.leave(after, "well")
    report = lane.report()
    assert (report.failed, report.well, report.in_flight) == (0, 1, 0)
    lane.take(free(2))
    lane.leave(await lane.enter(), "failed", "connect", "refused")
    assert lane.report().failed == 1


@in_loop
async def test_whoever_no_longer_waits_takes_no_place() -> None:
    lane = Lane(lambda: None)
    lane.take(Grant(version=0, connections=1, free=True))
    version = await lane.enter()
    left, stays = asyncio.create_task(lane.enter()), asyncio.create_task(lane.enter())
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.sleep(0)
    lane.leave(version, "well")
    await asyncio.sleep(0)
    assert stays.done() and left.cancelled() and lane.report().in_flight == 1
    # Cancelled in the moment in which it was let go: its place is free again.
    both = asyncio.create_task(lane.enter())
    await asyncio.sleep(0)
    lane.leave(0, "well")
    both.cancel()
    await asyncio.sleep(0)
    assert lane.report().in_flight == 0
