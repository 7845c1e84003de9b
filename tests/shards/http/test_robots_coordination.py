"""robots.txt among workers: one request per site, retries, lost workers, crawl delays."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from lavic.shards.http.robots import RETRY_S, Robots
from lavic.shards.ratelimit.coordinator import Coordinator
from lavic.shards.ratelimit.host_limiter import UNLIMITED, HostReport, Limits


def test_old_rules_apply_until_a_new_robots_txt_is_read() -> None:
    clock = [0.0]
    coordinator = Coordinator(Limits(), clock=lambda: clock[0])

    async def run() -> None:
        rules = Robots(text="User-agent: *\nDisallow: /")
        assert await coordinator.get_robots("http://x", "a") is None
        other = asyncio.create_task(coordinator.get_robots("http://x", "b"))
        await asyncio.sleep(0)
        await coordinator.put_robots("http://x", rules)
        assert await other == rules
        clock[0] = 25 * 3600.0
        assert await coordinator.get_robots("http://x", "b") is None
        await coordinator.put_robots("http://x", Robots(kind="connect", reason="refused"))
        assert await coordinator.get_robots("http://x", "a") == rules
        clock[0] += 3600.0
        assert await coordinator.get_robots("http://x", "a") is None

    asyncio.run(run())


def test_a_lost_workers_robots_txt_is_fetched_by_another() -> None:
    clock = [0.0]
    coordinator = Coordinator(Limits(), clock=lambda: clock[0])

    async def run() -> None:
        assert await coordinator.get_robots("http://x", "lost") is None
        other = asyncio.create_task(coordinator.get_robots("http://x", "b"))
        await asyncio.sleep(0.01)
        assert not other.done()
        clock[0] = 11.0
        assert await other is None
        assert await coordinator.get_robots("http://y", "gone") is None
        await coordinator.remove_worker("gone")
        assert await coordinator.get_robots("http://y", "b") is None

    asyncio.run(run())


def test_robots_txt_is_given_up_after_patience_and_retried_later() -> None:
    clock = [0.0]
    coordinator = Coordinator(Limits(patience=60.0, backoff=0.5), clock=lambda: clock[0])
    failing = Robots(kind="http_error", reason="HTTP 500")

    async def run() -> None:
        request_times = []
        while True:
            assert await coordinator.get_robots("http://x", "a") is None
            request_times.append(clock[0])
            given_up = await coordinator.put_robots("http://x", failing)
            if given_up:
                break
            clock[0] = coordinator._sites["http://x"].next_attempt
        assert request_times == [0, 0.5, 1.5, 3.5, 7.5, 15.5, 25.5, 35.5, 45.5, 55.5, 60.0]
        assert given_up.kind == "unasked" and given_up.reason == "HTTP 500"
        assert await coordinator.get_robots("http://x", "b") == given_up
        clock[0] += RETRY_S + 1
        assert await coordinator.get_robots("http://x", "b") is None
        assert await coordinator.put_robots("http://x", failing) == given_up
        clock[0] += RETRY_S + 1
        assert await coordinator.get_robots("http://x", "b") is None
        assert (
            await coordinator.put_robots("http://x", Robots())
            == Robots()
            == await coordinator.get_robots("http://x", "a")
        )

    asyncio.run(run())


def test_crawl_delay_is_kept_for_unused_hosts() -> None:
    clock = [0.0]
    coordinator = Coordinator(Limits(rate=UNLIMITED), clock=lambda: clock[0])

    async def grant(waiting: int = 5) -> Any:
        return (await coordinator.sync("a", {"x": HostReport(waiting=waiting)}, []))["x"]

    async def run() -> None:
        await coordinator.limit_rate("x", 0.1)
        assert (await grant()).interval == 10.0
        await coordinator.sync("a", {}, ["x"])
        clock[0] = 100.0
        await coordinator.sync("a", {}, [])
        assert "x" not in coordinator._hosts
        first = await grant()
        assert first.interval == 10.0 and first.slots == 1

    asyncio.run(run())


def test_waiting_for_robots_txt_does_not_poll() -> None:
    """Photos may wait a minute for a site: the coordinator, which serves all workers, must sleep meanwhile."""
    clock_reads = 0

    def clock() -> float:
        nonlocal clock_reads
        clock_reads += 1
        return time.monotonic()

    async def run() -> None:
        coordinator = Coordinator(Limits(patience=60.0, backoff=0.4), clock=clock)
        assert await coordinator.get_robots("http://a", "w") is None
        await coordinator.put_robots("http://a", Robots(kind="timeout", reason="no answer"))
        assert await coordinator.get_robots("http://a", "w") is None

    asyncio.run(run())
    assert clock_reads < 20
