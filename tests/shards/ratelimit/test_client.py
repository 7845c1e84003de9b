"""A worker's side of a host's budget, between what it is granted and what it has just seen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from lavic.shards.ratelimit.host_client import HostClient, HostUnavailable
from lavic.shards.ratelimit.host_limiter import Grant


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 20))

    run.__name__ = test.__name__
    return run


def unlimited(version: int = 0) -> Grant:
    return Grant(version=version, connections=99, unlimited=True)


@in_loop
async def test_slots_at_hand_are_not_asked_for_again() -> None:
    requests = []
    host = HostClient(lambda: requests.append(1))
    waiting = [asyncio.create_task(host.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    assert requests and host.report().waiting == 3
    host.apply(Grant(version=0, connections=9, slots=3, interval=1000.0))
    await asyncio.sleep(0.01)
    report = host.report()
    assert [task.done() for task in waiting] == [True, False, False]
    assert report.waiting == 0 and report.sent == 1 and report.in_flight == 1
    for task in waiting:
        task.cancel()


@in_loop
async def test_what_was_granted_before_the_host_complained_does_not_count() -> None:
    host = HostClient(lambda: None)
    host.apply(unlimited())
    version = await host.acquire()
    host.report()
    host.release(version, "throttled", retry_after=1000.0)
    host.apply(unlimited())
    waiting = asyncio.create_task(host.acquire())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    report = host.report()
    assert report.throttled and report.retry_after == 1000.0
    host.apply(Grant(version=1, connections=99, pause=1000.0, give_up=True, kind="throttled", reason="rest"))
    with pytest.raises(HostUnavailable, match="rest"):
        await waiting


@in_loop
async def test_what_was_sent_before_a_change_says_nothing_about_it() -> None:
    host = HostClient(lambda: None)
    host.apply(unlimited(0))
    before = await host.acquire()
    host.apply(unlimited(1))
    after = await host.acquire()
    host.release(before, "failed", "timeout", "slow")
    host.release(after, "success")
    report = host.report()
    assert (report.failures, report.successes, report.in_flight) == (0, 1, 0)
    host.apply(unlimited(2))
    host.release(await host.acquire(), "failed", "connect", "refused")
    assert host.report().failures == 1


@in_loop
async def test_whoever_no_longer_waits_takes_no_place() -> None:
    host = HostClient(lambda: None)
    host.apply(Grant(version=0, connections=1, unlimited=True))
    version = await host.acquire()
    left, stays = asyncio.create_task(host.acquire()), asyncio.create_task(host.acquire())
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.sleep(0)
    host.release(version, "success")
    await asyncio.sleep(0)
    assert stays.done() and left.cancelled() and host.report().in_flight == 1
    # Cancelled in the moment in which it was let go: its place is free again.
    both = asyncio.create_task(host.acquire())
    await asyncio.sleep(0)
    host.release(0, "success")
    both.cancel()
    await asyncio.sleep(0)
    assert host.report().in_flight == 0
