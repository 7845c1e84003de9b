"""Fetching from a faulty server: outcome kinds, deadlines, limits and blocked addresses."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from typing import Any

import pytest

from lavic.shards.http import ssrf_guard
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.http.fetcher import Fetcher
from lavic.shards.http.request import Response

QUICK = FetchSettings(allow_private=True, deadline=1.0, max_bytes=1_000_000, retries=2, backoff=0.01, host_rate=0)


def fetch(*urls: str, settings: FetchSettings = QUICK) -> list[Response]:
    async def run() -> list[Response]:
        async with Fetcher(settings) as fetcher:
            return list(await asyncio.gather(*(fetcher.fetch(url) for url in urls)))

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "kind", "http", "requests"),
    [
        ("plain.jpg", "ok", 200, 1),
        ("moved", "ok", 200, 1),
        ("packed", "ok", 200, 1),
        ("packed-bomb", "too_big", 200, 1),
        ("long", "ok", 200, 1),
        ("status/404", "gone", 404, 1),
        ("status/410", "gone", 410, 1),
        ("status/403", "forbidden", 403, 1),
        ("status/418", "http_error", 418, 1),
        ("status/500", "http_error", 500, 3),
        ("status/429", "throttled", 429, 3),
        ("status/503", "throttled", 503, 3),
        ("flaky/503", "ok", 200, 3),
        ("flaky/500", "ok", 200, 3),
        ("flaky/408", "ok", 200, 3),
        ("flaky/425", "ok", 200, 3),
        ("short", "truncated", 0, 3),
        ("hang-up", "connect", 0, None),
        ("big.jpg", "too_big", 200, 1),
        ("endless", "too_big", 200, 1),
        ("loop", "http_error", 302, 6),
        ("to-file", "bad_url", 302, 1),
        ("to-secrets", "blocked_address", 0, 1),
        ("drip", "too_slow", 200, 3),
    ],
)
def test_each_fault_has_an_outcome_kind(server: Any, path: str, kind: str, http: int, requests: int | None) -> None:
    (answer,) = fetch(f"{server.url}/{path}")
    assert (answer.kind, answer.http) == (kind, http), answer.reason
    assert (answer.kind == "ok") == bool(answer.body) and bool(answer.reason) == (kind != "ok")
    if requests:
        assert server.requests[f"/{path}"] == requests


@pytest.mark.parametrize("path", ["slow", "drip"])
def test_the_deadline_covers_the_complete_response(server: Any, path: str) -> None:
    began = time.monotonic()
    settings = FetchSettings(allow_private=True, deadline=0.5, retries=0, min_speed=0)
    (answer,) = fetch(f"{server.url}/{path}", settings=settings)
    assert answer.kind == "timeout" and "0.5 s" in answer.reason and time.monotonic() - began < 2.5


def test_wrong_content_lengths_do_not_disturb_other_responses(server: Any, photos: dict[str, bytes]) -> None:
    paths = [path for n in range(30) for path in ("long", "short", "status/404", f"n/{n}.jpg")]
    settings = FetchSettings(**{**vars(QUICK), "concurrency": 3})
    answers = dict(zip(paths, fetch(*(f"{server.url}/{path}" for path in paths), settings=settings), strict=True))
    assert all(answer.kind == "ok" for path, answer in answers.items() if path.startswith("n/"))
    assert (
        answers["long"].body == photos["plain.jpg"][: len(photos["plain.jpg"]) // 2]
        and answers["short"].kind == "truncated"
    )


def test_error_pages_reuse_connections(server: Any) -> None:
    settings = FetchSettings(**{**vars(QUICK), "concurrency": 2})
    fetch(*(f"{server.url}/status/404" for _ in range(40)), settings=settings)
    assert len(server.connections) <= 2


def test_retry_after_is_obeyed(server: Any) -> None:
    began = time.monotonic()
    (answer,) = fetch(f"{server.url}/patience")
    assert answer.kind == "ok" and answer.attempts == 2 and time.monotonic() - began >= 1.0


def test_connections_are_reused_and_limited(server: Any) -> None:
    settings = FetchSettings(allow_private=True, concurrency=4, host_rate=0)
    answers = fetch(*(f"{server.url}/n/{n}.jpg" for n in range(60)), settings=settings)
    assert all(answer.kind == "ok" for answer in answers) and len(server.connections) <= 4


def test_the_user_agent_names_crawler_and_contact(server: Any) -> None:
    fetch(f"{server.url}/plain.jpg", settings=FetchSettings(allow_private=True, contact="me@example.org"))
    (agent,) = server.agents
    assert agent.startswith("lavic/") and "me@example.org" in agent and "Mozilla" not in agent


@pytest.mark.parametrize(
    "link",
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
        "http://127.1:{port}/plain.jpg",
        "http://0177.0.0.1:{port}/plain.jpg",
        "http://0x7f000001:{port}/plain.jpg",
        "http://0x7f.1:{port}/plain.jpg",
        "http://0:{port}/plain.jpg",
        "http://127.0.0.1.:{port}/plain.jpg",
        "http://2130706433.:{port}/plain.jpg",
        "http://\uff11\uff12\uff17.0.0.1:{port}/plain.jpg",
        "http://127\u30020\u30020\u30021:{port}/plain.jpg",
        "http://%31%32%37.0.0.1:{port}/plain.jpg",
        "http://[::ffff:7f00:1]:{port}/plain.jpg",
        "http://[::1%25lo]:{port}/plain.jpg",
        "http://[0:0:0:0:0:0:0:1]:{port}/plain.jpg",
        "//127.0.0.1:{port}/plain.jpg",
        "http:/\\127.0.0.1:{port}/plain.jpg",
        "http://example.org@127.0.0.1:{port}/plain.jpg",
        "http://LOCALHOST.:{port}/plain.jpg",
    ],
)
def test_private_addresses_are_blocked_in_every_notation(server: Any, link: str) -> None:
    (answer,) = fetch(link.format(port=server.url.rpartition(":")[2]), settings=FetchSettings(retries=0))
    assert answer.kind == "blocked_address", answer
    assert not server.requests and not server.connections


@pytest.mark.parametrize(
    "host",
    [
        *("169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518", "169.254.169.254."),
        *("[::ffff:169.254.169.254]", "[::169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "[fe80::1%25eth0]"),
        *("100.100.100.200", "[fd00:ec2::254]", "\uff11\uff16\uff19.254.169.254"),
    ],
)
def test_metadata_addresses_are_blocked_with_allow_private(host: str) -> None:
    (answer,) = fetch(f"http://{host}/latest/meta-data")
    assert answer.kind == "blocked_address" and "metadata" in answer.reason and answer.attempts == 1


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f.0.0.1", "\uff11\uff12\uff17.0.0.1", "127.0.0.1."])
def test_loopback_in_every_notation_is_reached_with_allow_private(server: Any, host: str) -> None:
    port = server.url.rpartition(":")[2]
    (answer,) = fetch(f"http://{host}:{port}/plain.jpg")
    assert answer.kind == "ok" and server.requests == {"/plain.jpg": 1}


@pytest.mark.parametrize(
    "link",
    [
        *("file:///etc/passwd", "ftp://example.org/x.jpg", "data:image/gif;base64,R0lGODlhAQABAAAAACw=", "tel:123"),
        *("no address", "", " ", "http://", "https:///", "x.jpg", "images/x.jpg", "/images/x.jpg"),
        *("http://x:99999999/", "http://x:0/", "http://x:port/", "http://[::1/x.jpg", "http://::1/x.jpg"),
        *("http://1.2.3.4.5/x.jpg", "http://256.1.1.1/x.jpg", "http://08.8.8.8/x.jpg", "http://4294967296/x.jpg"),
        *("http://exa mple.org/x.jpg", "http://a..b/x.jpg", f"http://{'a' * 64}.org/x.jpg", "http://a%00b/x.jpg"),
        "http://example.org/" + "a" * 100_000,
    ],
)
def test_a_malformed_link_is_a_bad_url(link: str) -> None:
    (answer,) = fetch(link)
    assert answer.kind == "bad_url" and answer.attempts == 0 and "link" in answer.reason and len(answer.reason) < 150


def test_every_redirect_is_checked(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server counts as public here: its redirects lead into a private network."""
    loopback = ipaddress.ip_address("127.0.0.1")
    real = ssrf_guard.is_public
    monkeypatch.setattr(ssrf_guard, "is_public", lambda address: address == loopback or real(address))
    port = server.url.rpartition(":")[2]
    for target in ("http://10.20.30.40/x.jpg", f"http://[::1]:{port}/n/1.jpg", f"http://127.0.0.2:{port}/n/1.jpg"):
        server.elsewhere = target
        (answer,) = fetch(f"{server.url}/away", settings=FetchSettings(retries=0))
        assert answer.kind == "blocked_address" and "private network" in answer.reason
    server.elsewhere = f"{server.url}/n/1.jpg"
    assert fetch(f"{server.url}/away", settings=FetchSettings(retries=0))[0].kind == "ok"
    assert server.requests["/n/1.jpg"] == 1


def test_dns_rebinding_does_not_reach_a_private_address(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host resolves to a public address first, then to loopback."""
    answers = iter([[("93.184.216.34", 80)], [("127.0.0.1", 80)], [("127.0.0.1", 80)]])
    lookups = []

    async def look_up(loop: Any, host: str, *_: object, **__: object) -> list[Any]:
        lookups.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in next(answers)]

    connected = []

    async def connect(loop: Any, sock: Any, target: Any) -> None:
        connected.append(target)
        raise ConnectionRefusedError("no connection in this test")

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", look_up)
    monkeypatch.setattr(asyncio.selector_events.BaseSelectorEventLoop, "sock_connect", connect)
    settings = FetchSettings(retries=0, robots=False)
    assert fetch("http://rebinding.example/1.jpg", settings=settings)[0].kind == "connect"
    assert fetch("http://rebinding.example/1.jpg", settings=settings)[0].kind == "blocked_address"
    assert [target[0] for target in connected] == ["93.184.216.34"] and len(lookups) == 2 and not server.requests


def test_redirects_from_https_to_http_and_untrusted_certificates_are_refused(
    server: Any, tls_servers: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted, foreign = tls_servers
    trusted.elsewhere = f"{server.url}/n/1.jpg"
    kinds = [answer.kind for answer in fetch(f"{trusted.url}/n/1.jpg", f"{trusted.url}/away", f"{foreign.url}/n/1.jpg")]
    assert kinds == ["ok", "blocked_address", "tls"] and not server.requests and not foreign.requests


def test_connection_failures_have_outcome_kinds(server: Any) -> None:
    port = server.url.rpartition(":")[2]
    tls, dns = fetch(f"https://127.0.0.1:{port}/plain.jpg", "http://no-such-host.invalid/x.jpg")
    assert (tls.kind, dns.kind) == ("tls", "dns") and tls.attempts == dns.attempts == 0
    server.close()
    without_robots = FetchSettings(**{**vars(QUICK), "robots": False})
    (refused,) = fetch(f"http://127.0.0.1:{port}/plain.jpg", settings=without_robots)
    assert refused.kind == "connect" and refused.attempts == 3
    (refused,) = fetch(f"http://127.0.0.1:{port}/plain.jpg", settings=FetchSettings(**{**vars(QUICK), "patience": 0.5}))
    assert refused.kind == "connect" and refused.attempts == 0 and "robots.txt" in refused.reason
