"""Several workers and one budget: what the server sees of them all together. In one process, without Ray."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import pytest

from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.http.fetcher import Fetcher
from lavic.shards.http.request import Response
from lavic.shards.ratelimit.coordinator import Coordinator

pytestmark = pytest.mark.slow

WORKERS = 4


def crawl(urls: list[str], settings: FetchSettings, coordinator: Coordinator | None = None) -> list[Response]:
    """Each worker with its own connections, as in a process of its own."""

    async def run() -> list[Response]:
        shared = coordinator or Coordinator(settings.limits)

        async def work(part: list[str]) -> list[Response]:
            async with Fetcher(settings, shared) as fetcher:
                gate = asyncio.Semaphore(settings.concurrency)

                async def fetch(url: str) -> Response:
                    async with gate:
                        return await fetcher.fetch(url)

                return list(await asyncio.gather(*(fetch(url) for url in part)))

        parts = await asyncio.gather(*(work(urls[n::WORKERS]) for n in range(WORKERS)))
        return [answer for part in parts for answer in part]

    return asyncio.run(run())


def settings(**chosen: Any) -> FetchSettings:
    return FetchSettings(allow_private=True, robots=False, backoff=0.01, host_connections=0, **chosen)


def test_all_workers_together_keep_to_the_rate(server: Any) -> None:
    answers = crawl([f"{server.url}/n/{n}.jpg" for n in range(200)], settings(host_rate=100, concurrency=8))
    assert all(answer.kind == "ok" for answer in answers) and len(server.times) == 200
    # A slow machine is late, never early: the time that 200 requests take has a lower bound alone.
    assert server.times[-1] - server.times[0] > 0.9 * 199 / 100


def test_after_retry_after_no_worker_comes_early(server: Any) -> None:
    server.delay = 0.01
    coordinator = Coordinator(settings().limits)

    async def rest() -> None:
        await asyncio.sleep(0.5)
        server.rest_until = time.monotonic() + 3.0

    async def both() -> list[Response]:
        resting = asyncio.create_task(rest())
        urls = [f"{server.url}/n/{n}.jpg" for n in range(200)]
        parts = await asyncio.gather(*(work(urls[n::WORKERS]) for n in range(WORKERS)))
        await resting
        return [answer for part in parts for answer in part]

    async def work(part: list[str]) -> list[Response]:
        async with Fetcher(settings(host_rate=0), coordinator) as fetcher:
            answers = []
            for url in part:
                answers.append(await fetcher.fetch(url))
                await asyncio.sleep(0.01)
            return answers

    answers = asyncio.run(both())
    assert Counter(answer.kind for answer in answers) == {"ok": 200}
    early = [at - server.rest_until for at in server.times if server.rest_until - 2.0 < at < server.rest_until]
    assert not early and max(answer.attempts for answer in answers) >= 2


def test_connections_are_counted_over_all_workers(server: Any) -> None:
    server.delay = 0.02
    chosen = FetchSettings(allow_private=True, robots=False, host_rate=0, host_connections=6, concurrency=16)
    answers = crawl([f"{server.url}/n/{n}.jpg" for n in range(120)], chosen)
    assert all(answer.kind == "ok" for answer in answers)
    assert 2 <= server.most_busy <= 6


def test_a_long_rest_is_not_waited_for(server: Any) -> None:
    server.rest_until = time.monotonic() + 1000.0
    answers = crawl([f"{server.url}/n/{n}.jpg" for n in range(100)], settings(host_rate=0, patience=5.0, concurrency=2))
    attempted = [answer for answer in answers if answer.attempts]
    assert {answer.kind for answer in attempted} == {"throttled"} and len(attempted) == len(server.times) <= 2 * WORKERS
    left = [answer for answer in answers if not answer.attempts]
    assert {answer.kind for answer in left} == {"unasked"} and all("asks to wait" in answer.reason for answer in left)


def test_a_dead_host_is_soon_left_alone(server: Any) -> None:
    server.close()
    chosen = settings(host_rate=0, patience=0.0, retries=0, concurrency=2)
    answers = crawl([f"{server.url}/n/{n}.jpg" for n in range(400)], chosen)
    assert {answer.kind for answer in answers} == {"connect"}
    assert sum(answer.attempts for answer in answers) < 100
    assert "paused" in answers[-1].reason and answers[-1].attempts == 0


def test_a_host_that_comes_back_is_asked_again(server: Any) -> None:
    chosen = settings(host_rate=0, patience=30.0, retries=0, concurrency=4)
    paths = [f"{server.url}/status/500"] * 30 + [f"{server.url}/n/{n}.jpg" for n in range(30)]
    answers = crawl(paths, chosen)
    assert Counter(answer.kind for answer in answers) == {"ok": 30, "http_error": 30}


def test_one_host_does_not_hold_up_another(server: Any, second_server: Any) -> None:
    server.rest_until = time.monotonic() + 1000.0
    urls = [f"{origin.url}/n/{n}.jpg" for n in range(40) for origin in (server, second_server)]
    answers = crawl(urls, settings(host_rate=0, patience=1.0))
    assert Counter(answer.kind == "ok" for answer in answers) == {True: 40, False: 40}
    assert {answer.kind for answer in answers if answer.attempts} == {"ok", "throttled"}
