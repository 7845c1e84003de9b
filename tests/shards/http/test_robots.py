"""What sites forbid: robots.txt by RFC 9309, and opt-outs in headers."""

from __future__ import annotations

import asyncio
import codecs
import gzip
import time
import zlib
from typing import Any

import pytest

from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.http.fetcher import Fetcher
from lavic.shards.http.request import Response
from lavic.shards.http.robots import MAX_BYTES, RETRY_S, Robots, Rules, opt_out
from lavic.shards.ratelimit.coordinator import Coordinator
from lavic.shards.ratelimit.host_limiter import UNLIMITED, HostReport, Limits
from tests.shards.fault_server import PHOTOS

QUICK = FetchSettings(allow_private=True, deadline=2.0, retries=1, backoff=0.01, host_rate=0, patience=0.3)


def fetch(*urls: str, settings: FetchSettings = QUICK, workers: int = 1) -> list[Response]:
    async def run() -> list[Response]:
        coordinator = Coordinator(settings.limits)

        async def work(part: tuple[str, ...]) -> list[Response]:
            async with Fetcher(settings, coordinator) as fetcher:
                return list(await asyncio.gather(*(fetcher.fetch(url) for url in part)))

        parts = await asyncio.gather(*(work(urls[n::workers]) for n in range(workers)))
        return [answer for part in parts for answer in part]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("", True),
        ("User-agent: *\nDisallow: /", False),
        ("User-agent: *\nDisallow: /\nAllow: /images/", True),
        ("User-agent: *\nDisallow: /images/*.jpg$", False),
        ("User-agent: *\nDisallow: /\n\nUser-agent: LaViC\nDisallow: /private/", True),
        ("User-agent: lavic\nDisallow: /images/\n\nUser-agent: *\nAllow: /", False),
        ("User-agent: googlebot\nDisallow: /", True),
        ("User-agent: *\nAllow: /\n\nUser-agent: LaViC/1.0 (photos)\nDisallow: /images/", False),
        ("User-agent: lavic-video\nDisallow: /images/", True),
        ("\ufeffUser-agent: *\nDisallow: /images", False),
        ("User-agent: *\nDisallow: /%69mages/", False),
        ("<html>no robots</html>", True),
    ],
)
def test_rules(text: str, allowed: bool) -> None:
    assert Rules(Robots.read(text.encode())).allow("https://example.org/images/1.jpg") == allowed


RULES = "User-agent: *\nDisallow: /images/caf\u00e9/\nDisallow: /n/\n"


@pytest.mark.parametrize(
    ("body", "codings"),
    [
        (RULES.encode(), ()),
        (RULES.encode(), ("gzip",)),
        (RULES.encode(), ("zstd",)),
        (RULES.encode("utf-8-sig"), ()),
        (b"# x\n".join(["".encode("utf-8-sig"), RULES.encode("utf-8-sig")]), ()),
        (RULES.encode("utf-16"), ()),
        (RULES.encode("utf-16-le"), ()),
        (RULES.encode("utf-16-be"), ()),
        (codecs.BOM_UTF32_BE + RULES.encode("utf-32-be"), ()),
        (RULES.replace("\n", "\r").encode(), ()),
        (gzip.compress(RULES.encode(), mtime=0), ()),
        (gzip.compress(RULES.encode("utf-16"), mtime=0), ("gzip",)),
        (zlib.compress(RULES.encode()), ("deflate",)),
        (b"#" * 300_000 + b"\n" + RULES.encode(), ()),
        (RULES.encode() + b"\x07" + bytes(500), ()),
    ],
)
def test_rules_are_read_however_they_are_written(body: bytes, codings: tuple[str, ...]) -> None:
    rules = Rules(Robots.read(body, codings))
    allowed = [rules.allow(f"https://example.org/{path}/1.jpg") for path in ("n", "images/caf%C3%A9", "images/the")]
    assert allowed == [False, False, True]


def test_bytes_of_an_old_encoding_forbid_the_address_that_holds_them() -> None:
    rules = Rules(Robots.read(RULES.encode("latin-1")))
    assert not rules.allow("https://example.org/images/caf%E9/1.jpg") and not rules.allow("https://example.org/n/1.jpg")
    assert rules.allow("https://example.org/images/cafe/1.jpg")


def test_a_rule_that_is_cut_in_two_is_none() -> None:
    rules = b"User-agent: *\nDisallow: /n/\n"
    body = (rules + b"#" * (MAX_BYTES - len(rules) - 13) + b"\nDisallow: /images/private/")[:MAX_BYTES]
    assert body.endswith(b"\nDisallow: /i")
    assert Rules(Robots.read(body)).allow("https://example.org/images/1.jpg")
    assert not Rules(Robots.read(body)).allow("https://example.org/n/1.jpg")


@pytest.mark.parametrize(
    ("body", "codings"),
    [(bytes(range(256)), ()), (gzip.compress(RULES.encode(), mtime=0)[:40], ("gzip",)), (b"\x8b\x00\x80x", ("br",))],
)
def test_what_cannot_be_decoded_allows_nothing_and_says_so(body: bytes, codings: tuple[str, ...]) -> None:
    robots = Robots.read(body, codings)
    assert robots.kind == "unasked" and robots.final and robots.reason


@pytest.mark.parametrize("body", [b"<html>Not found</html>", PHOTOS["plain.jpg"], PHOTOS["clear.png"], b"", b"{}"])
def test_what_holds_no_rules_allows_all(body: bytes) -> None:
    assert Rules(Robots.read(body)).allow("https://example.org/n/1.jpg")


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, {"Content-Encoding": ""}),
        (200, {"Content-Encoding": "utf-8"}),
        (200, {"Content-Encoding": "x-unknown"}),
        (203, {}),
        (206, {"Content-Range": "bytes 0-28/9999"}),
        (226, {}),
    ],
)
def test_a_robots_txt_that_is_there_is_obeyed(server: Any, status: int, headers: dict[str, str]) -> None:
    server.robots, server.robots_headers = (status, b"User-agent: *\nDisallow: /n/\n"), headers
    assert [answer.kind for answer in fetch(f"{server.url}/n/1.jpg", f"{server.url}/plain.jpg")] == ["opted_out", "ok"]


def test_a_robots_txt_on_another_host_is_read_for_this_one(server: Any, second_server: Any) -> None:
    server.robots, server.robots_headers = (302, b""), {"Location": f"{second_server.url}/robots.txt"}
    second_server.robots = (200, b"User-agent: *\nDisallow: /n/\n")
    assert fetch(f"{server.url}/n/1.jpg")[0].kind == "opted_out" and not server.requests


def test_a_robots_txt_that_cannot_be_decoded_is_not_waited_for(server: Any) -> None:
    server.robots, server.robots_headers = (200, b"\x8b\x02\x80" + bytes(range(64))), {"Content-Encoding": "br"}
    settings = FetchSettings(**{**vars(QUICK), "patience": 1000.0})
    (answer,) = fetch(f"{server.url}/n/1.jpg", settings=settings)
    assert (answer.kind, answer.attempts) == ("unasked", 0) and "br" in answer.reason and not server.requests


@pytest.mark.parametrize("trouble", [(500, b""), (503, b""), (429, b"")])
def test_photos_wait_for_a_robots_txt_that_cannot_be_read_now(server: Any, trouble: tuple[int, bytes]) -> None:
    server.robots_first = [trouble, trouble]
    settings = FetchSettings(**{**vars(QUICK), "patience": 30.0})
    answers = fetch(*(f"{server.url}/n/{n}.jpg" for n in range(200)), settings=settings, workers=2)
    assert {answer.kind for answer in answers} == {"ok"} and server.robots_asked == 3


def test_a_host_that_nobody_reaches_ends_its_photos_under_that_name(server: Any) -> None:
    server.close()
    answers = fetch(*(f"{server.url}/n/{n}.jpg" for n in range(200)), workers=2)
    assert {(answer.kind, answer.attempts) for answer in answers} == {("connect", 0)}


def test_the_delay_a_site_asks_for() -> None:
    assert Rules(Robots(text="User-agent: *\nCrawl-delay: 2.5")).delay == 2.5
    assert Rules(Robots(text="User-agent: other\nCrawl-delay: 2.5")).delay == 0.0


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ([], ""),
        (["noai"], "noai"),
        (["NoImageAI, nofollow"], "noimageai"),
        (["nofollow", "all, noindex"], "noindex"),
        (["noml"], "noml"),
        (["none"], "none"),
        (["max-snippet: 20, noimageindex"], "noimageindex"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "noai"),
        (["googlebot: noindex, noai"], ""),
        (["lavic: noindex"], "noindex"),
        (["googlebot: nofollow, lavic: noai"], "noai"),
        (["*: noai"], "noai"),
        (["googlebot: noindex", "noml"], "noml"),
        (["index, follow", "noarchive"], ""),
        ([""], ""),
    ],
)
def test_opt_outs(tags: list[str], found: str) -> None:
    assert opt_out(tags) == (f"X-Robots-Tag: {found}" if found else "")


def test_reserved_rights() -> None:
    assert opt_out([], "1") and not opt_out([], "0")


def test_a_site_is_asked_once_for_all_workers_and_obeyed(server: Any) -> None:
    server.robots = (200, b"User-agent: *\nDisallow: /n/\nAllow: /n/1\n")
    answers = fetch(*(f"{server.url}/n/{n}.jpg" for n in range(1, 21)), workers=4)
    assert sorted({answer.kind for answer in answers}) == ["ok", "opted_out"]
    assert server.robots_asked == 1
    assert all(path.startswith("/n/1") for path in server.requests) and len(server.requests) == 11


def test_headers_that_opt_out(server: Any) -> None:
    urls = [f"{server.url}/{path}" for path in ("tagged/noai", "tagged/googlebot:+noai", "reserved", "tagged/noml")]
    assert [answer.kind for answer in fetch(*urls)] == ["opted_out", "ok", "opted_out", "opted_out"]
    unheeded = FetchSettings(**{**vars(QUICK), "robots": False})
    server.robots = (200, b"User-agent: *\nDisallow: /\n")
    assert {answer.kind for answer in fetch(*urls, settings=unheeded)} == {"ok"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, "ok"), (403, "ok"), (204, "ok"), (500, "unasked"), (503, "unasked"), (429, "unasked")],
)
def test_a_robots_txt_that_is_away_allows_all_and_one_out_of_reach_nothing(server: Any, status: int, kind: str) -> None:
    server.robots = (status, b"User-agent: *\nDisallow: /\n" if status != 204 else b"")
    (answer, *_) = answers = fetch(*(f"{server.url}/n/{n}.jpg" for n in range(5)))
    assert {answer.kind for answer in answers} == {kind}
    if kind == "ok":
        assert server.robots_asked == 1
    else:
        # At once, after 0.1 s, 0.2 s more, and at the end of the patience.
        assert 2 <= server.robots_asked <= 4
        assert not server.requests and "robots.txt" in answer.reason and answer.attempts == 0


def test_a_long_robots_txt_is_read_as_far_as_the_rfc_demands(server: Any) -> None:
    rules = b"User-agent: *\nDisallow: /n/\n"
    server.robots = (200, rules + b"#" * MAX_BYTES * 3)
    assert fetch(f"{server.url}/n/1.jpg")[0].kind == "opted_out"


def test_a_redirect_is_followed_only_where_the_next_site_allows_it(server: Any, second_server: Any) -> None:
    server.elsewhere = f"{second_server.url}/n/1.jpg"
    second_server.robots = (200, b"User-agent: lavic\nDisallow: /n/\n")
    assert fetch(f"{server.url}/away")[0].kind == "opted_out"
    assert not second_server.requests
    second_server.robots = (404, b"")
    assert fetch(f"{server.url}/away")[0].kind == "ok"


def test_what_cannot_be_read_anew_holds_on() -> None:
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


def test_what_a_lost_worker_was_to_fetch_is_fetched_by_another() -> None:
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


def test_a_robots_txt_that_cannot_be_read_is_given_up_after_the_patience_and_tried_again_later() -> None:
    clock = [0.0]
    coordinator = Coordinator(Limits(patience=60.0, backoff=0.5), clock=lambda: clock[0])
    failing = Robots(kind="http_error", reason="HTTP 500")

    async def run() -> None:
        asked = []
        while True:
            assert await coordinator.get_robots("http://x", "a") is None
            asked.append(clock[0])
            given_up = await coordinator.put_robots("http://x", failing)
            if given_up:
                break
            clock[0] = coordinator._sites["http://x"].next_attempt
        assert asked == [0, 0.5, 1.5, 3.5, 7.5, 15.5, 25.5, 35.5, 45.5, 55.5, 60.0]
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


def test_a_delay_is_kept_before_the_host_is_asked_and_while_nobody_asks_it() -> None:
    clock = [0.0]
    coordinator = Coordinator(Limits(rate=UNLIMITED), clock=lambda: clock[0])

    async def grant(wanted: int = 5) -> Any:
        return (await coordinator.sync("a", {"x": HostReport(waiting=wanted)}, []))["x"]

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


def test_a_delay_of_a_day_ends_that_hosts_photos_alone(server: Any, second_server: Any) -> None:
    server.robots = (200, b"User-agent: *\nCrawl-delay: 86400\nDisallow: /n/7.jpg\n")
    urls = [f"{one.url}/n/{n}.jpg" for n in range(20) for one in (server, second_server)]
    answers = dict(zip(urls, fetch(*urls), strict=True))
    assert {answer.kind for url, answer in answers.items() if url.startswith(second_server.url)} == {"ok"}
    slow = {url: answer for url, answer in answers.items() if url.startswith(server.url)}
    assert slow.pop(f"{server.url}/n/7.jpg").kind == "opted_out" and not server.requests
    assert all(answer.kind == "throttled" and "Crawl-delay" in answer.reason for answer in slow.values())


def test_waiting_for_the_next_reading_costs_no_cpu() -> None:
    """Photos wait for a site up to a minute: the coordinator, which serves all workers, must sleep meanwhile."""
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return time.monotonic()

    async def run() -> None:
        coordinator = Coordinator(Limits(patience=60.0, backoff=0.4), clock=clock)
        assert await coordinator.get_robots("http://a", "w") is None
        await coordinator.put_robots("http://a", Robots(kind="timeout", reason="no answer"))
        assert await coordinator.get_robots("http://a", "w") is None

    asyncio.run(run())
    assert looks < 20
