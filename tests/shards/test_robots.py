"""What sites forbid: robots.txt by RFC 9309, and opt-outs in headers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lavic.shards.broker import Broker
from lavic.shards.fetch import Answer, Fetcher, FetchSettings
from lavic.shards.host import Limits
from lavic.shards.robots import MAX_BYTES, Robots, Rules, opt_out

QUICK = FetchSettings(allow_private=True, deadline=2.0, retries=1, backoff=0.01, host_rate=0)


def fetch(*urls: str, settings: FetchSettings = QUICK, workers: int = 1) -> list[Answer]:
    async def run() -> list[Answer]:
        office = Broker(settings.limits)

        async def work(part: tuple[str, ...]) -> list[Answer]:
            async with Fetcher(settings, office) as fetcher:
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
        ("\ufeffUser-agent: *\nDisallow: /images", False),
        ("User-agent: *\nDisallow: /%69mages/", False),
        ("<html>no robots</html>", True),
    ],
)
def test_rules(text: str, allowed: bool) -> None:
    assert Rules(Robots(text=text)).allow("https://example.org/images/1.jpg") == allowed


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
    [(404, "ok"), (403, "ok"), (204, "ok"), (500, "http_error"), (503, "throttled"), (429, "throttled")],
)
def test_a_robots_txt_that_is_away_allows_all_and_one_out_of_reach_nothing(server: Any, status: int, kind: str) -> None:
    server.robots = (status, b"User-agent: *\nDisallow: /\n" if status != 204 else b"")
    (answer, *_) = answers = fetch(*(f"{server.url}/n/{n}.jpg" for n in range(5)))
    assert {answer.kind for answer in answers} == {kind}
    assert server.robots_asked == (2 if kind != "ok" else 1)
    if kind != "ok":
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
    broker = Broker(Limits(), clock=lambda: clock[0])

    async def run() -> None:
        rules = Robots(text="User-agent: *\nDisallow: /")
        assert await broker.robots("http://x", "a") is None
        other = asyncio.create_task(broker.robots("http://x", "b"))
        await asyncio.sleep(0)
        await broker.keep_robots("http://x", rules)
        assert await other == rules
        clock[0] = 25 * 3600.0
        assert await broker.robots("http://x", "b") is None
        await broker.keep_robots("http://x", Robots(kind="connect", reason="refused"))
        assert await broker.robots("http://x", "a") == rules
        clock[0] += 3600.0
        assert await broker.robots("http://x", "a") is None

    asyncio.run(run())


def test_what_a_lost_worker_was_to_fetch_is_fetched_by_another() -> None:
    clock = [0.0]
    broker = Broker(Limits(), clock=lambda: clock[0])

    async def run() -> None:
        assert await broker.robots("http://x", "lost") is None
        other = asyncio.create_task(broker.robots("http://x", "b"))
        await asyncio.sleep(0.01)
        assert not other.done()
        clock[0] = 11.0
        assert await other is None
        assert await broker.robots("http://y", "gone") is None
        await broker.leave("gone")
        assert await broker.robots("http://y", "b") is None

    asyncio.run(run())
