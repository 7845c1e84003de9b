"""Fetching from a server that does things wrong: each ends under its name, in time, within its limits."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from lavic.shards.fetch import Answer, Fetcher, FetchSettings

QUICK = FetchSettings(allow_private=True, deadline=1.0, max_bytes=1_000_000, retries=2, backoff=0.01)


def fetch(*urls: str, settings: FetchSettings = QUICK) -> list[Answer]:
    async def run() -> list[Answer]:
        async with Fetcher(settings) as fetcher:
            return list(await asyncio.gather(*(fetcher.fetch(url) for url in urls)))

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "kind", "http", "requests"),
    [
        ("plain.jpg", "ok", 200, 1),
        ("moved", "ok", 200, 1),
        ("status/404", "gone", 404, 1),
        ("status/410", "gone", 410, 1),
        ("status/403", "forbidden", 403, 1),
        ("status/418", "http_error", 418, 1),
        ("status/500", "http_error", 500, 3),
        ("status/429", "throttled", 429, 3),
        ("status/503", "throttled", 503, 3),
        ("flaky/503", "ok", 200, 3),
        ("flaky/500", "ok", 200, 3),
        ("short", "truncated", 0, 3),
        ("hang-up", "connect", 0, None),
        ("big.jpg", "too_big", 200, 1),
        ("endless", "too_big", 200, 1),
        ("loop", "http_error", 302, 6),
        ("to-file", "blocked_address", 0, 1),
    ],
)
def test_what_a_server_does_has_a_name(server: Any, path: str, kind: str, http: int, requests: int | None) -> None:
    (answer,) = fetch(f"{server.url}/{path}")
    assert (answer.kind, answer.http) == (kind, http), answer.reason
    assert (answer.kind == "ok") == bool(answer.body) and bool(answer.reason) == (kind != "ok")
    if requests:
        assert server.requests[f"/{path}"] == requests


@pytest.mark.parametrize("path", ["slow", "drip"])
def test_the_deadline_is_for_the_whole_answer(server: Any, path: str) -> None:
    began = time.monotonic()
    settings = FetchSettings(allow_private=True, deadline=0.5, retries=0)
    (answer,) = fetch(f"{server.url}/{path}", settings=settings)
    assert answer.kind == "timeout" and "0.5 s" in answer.reason and time.monotonic() - began < 2


def test_retry_after_is_waited_for(server: Any) -> None:
    began = time.monotonic()
    (answer,) = fetch(f"{server.url}/patience")
    assert answer.kind == "ok" and answer.attempts == 2 and time.monotonic() - began >= 1.0


def test_connections_are_kept_and_limited(server: Any) -> None:
    settings = FetchSettings(allow_private=True, concurrency=4)
    answers = fetch(*(f"{server.url}/n/{n}.jpg" for n in range(60)), settings=settings)
    assert all(answer.kind == "ok" for answer in answers) and len(server.connections) <= 4


def test_the_crawler_says_who_it_is(server: Any) -> None:
    fetch(f"{server.url}/plain.jpg", settings=FetchSettings(allow_private=True, contact="me@example.org"))
    (agent,) = server.agents
    assert agent.startswith("lavic/") and "me@example.org" in agent and "Mozilla" not in agent


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{port}/plain.jpg",
        "http://localhost:{port}/plain.jpg",
        "http://2130706433:{port}/plain.jpg",
        "http://[::1]:{port}/plain.jpg",
        "http://[::ffff:127.0.0.1]:{port}/plain.jpg",
        "http://0.0.0.0:{port}/plain.jpg",
        "http://169.254.169.254/latest/meta-data",
        "http://10.1.2.3/x.jpg",
        "http://192.168.0.1/x.jpg",
        "file:///etc/passwd",
        "ftp://example.org/x.jpg",
        "no address",
        "",
        "http://",
        "http://x:99999999/",
    ],
)
def test_private_and_odd_addresses_are_refused(server: Any, address: str) -> None:
    (answer,) = fetch(address.format(port=server.url.rpartition(":")[2]), settings=FetchSettings(retries=0))
    assert answer.kind == "blocked_address", answer
    assert not server.requests


def test_failures_of_the_connection_have_names(server: Any) -> None:
    port = server.url.rpartition(":")[2]
    tls, dns = fetch(f"https://127.0.0.1:{port}/plain.jpg", "http://no-such-host.invalid/x.jpg")
    assert (tls.kind, dns.kind) == ("tls", "dns")
    server.close()
    (refused,) = fetch(f"http://127.0.0.1:{port}/plain.jpg")
    assert refused.kind == "connect" and refused.attempts == 3
