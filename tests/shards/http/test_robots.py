"""robots.txt by RFC 9309 and opt-out headers: how they are parsed and obeyed."""

from __future__ import annotations

import asyncio
import codecs
import gzip
import zlib
from typing import Any

import pytest

from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.http.fetcher import Fetcher
from lavic.shards.http.request import Response
from lavic.shards.http.robots import MAX_BYTES, Robots, Rules, opt_out
from lavic.shards.ratelimit.coordinator import Coordinator
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
def test_rules_allow_or_forbid_a_url(text: str, allowed: bool) -> None:
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
def test_rules_are_parsed_in_any_encoding(body: bytes, codings: tuple[str, ...]) -> None:
    rules = Rules(Robots.read(body, codings))
    allowed = [rules.allow(f"https://example.org/{path}/1.jpg") for path in ("n", "images/caf%C3%A9", "images/the")]
    assert allowed == [False, False, True]


def test_latin1_bytes_in_a_rule_match_the_percent_encoded_url() -> None:
    rules = Rules(Robots.read(RULES.encode("latin-1")))
    assert not rules.allow("https://example.org/images/caf%E9/1.jpg") and not rules.allow("https://example.org/n/1.jpg")
    assert rules.allow("https://example.org/images/cafe/1.jpg")


def test_a_rule_truncated_at_the_size_limit_is_ignored() -> None:
    rules = b"User-agent: *\nDisallow: /n/\n"
    body = (rules + b"#" * (MAX_BYTES - len(rules) - 13) + b"\nDisallow: /images/private/")[:MAX_BYTES]
    assert body.endswith(b"\nDisallow: /i")
    assert Rules(Robots.read(body)).allow("https://example.org/images/1.jpg")
    assert not Rules(Robots.read(body)).allow("https://example.org/n/1.jpg")


@pytest.mark.parametrize(
    ("body", "codings"),
    [(bytes(range(256)), ()), (gzip.compress(RULES.encode(), mtime=0)[:40], ("gzip",)), (b"\x8b\x00\x80x", ("br",))],
)
def test_an_undecodable_robots_txt_allows_nothing(body: bytes, codings: tuple[str, ...]) -> None:
    robots = Robots.read(body, codings)
    assert robots.kind == "unasked" and robots.final and robots.reason


@pytest.mark.parametrize("body", [b"<html>Not found</html>", PHOTOS["plain.jpg"], PHOTOS["clear.png"], b"", b"{}"])
def test_content_without_rules_allows_everything(body: bytes) -> None:
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
def test_rules_are_obeyed_for_any_successful_response(server: Any, status: int, headers: dict[str, str]) -> None:
    server.robots, server.robots_headers = (status, b"User-agent: *\nDisallow: /n/\n"), headers
    assert [answer.kind for answer in fetch(f"{server.url}/n/1.jpg", f"{server.url}/plain.jpg")] == ["opted_out", "ok"]


def test_a_redirected_robots_txt_applies_to_the_first_host(server: Any, second_server: Any) -> None:
    server.robots, server.robots_headers = (302, b""), {"Location": f"{second_server.url}/robots.txt"}
    second_server.robots = (200, b"User-agent: *\nDisallow: /n/\n")
    assert fetch(f"{server.url}/n/1.jpg")[0].kind == "opted_out" and not server.requests


def test_an_undecodable_robots_txt_is_not_retried(server: Any) -> None:
    server.robots, server.robots_headers = (200, b"\x8b\x02\x80" + bytes(range(64))), {"Content-Encoding": "br"}
    settings = FetchSettings(**{**vars(QUICK), "patience": 1000.0})
    (answer,) = fetch(f"{server.url}/n/1.jpg", settings=settings)
    assert (answer.kind, answer.attempts) == ("unasked", 0) and "br" in answer.reason and not server.requests


@pytest.mark.parametrize("failure", [(500, b""), (503, b""), (429, b"")])
def test_photos_wait_while_robots_txt_is_retried(server: Any, failure: tuple[int, bytes]) -> None:
    server.robots_first = [failure, failure]
    settings = FetchSettings(**{**vars(QUICK), "patience": 30.0})
    answers = fetch(*(f"{server.url}/n/{n}.jpg" for n in range(200)), settings=settings, workers=2)
    assert {answer.kind for answer in answers} == {"ok"} and server.robots_asked == 3


def test_photos_of_an_unreachable_host_fail_with_connect(server: Any) -> None:
    server.close()
    answers = fetch(*(f"{server.url}/n/{n}.jpg" for n in range(200)), workers=2)
    assert {(answer.kind, answer.attempts) for answer in answers} == {("connect", 0)}


def test_crawl_delay_is_parsed() -> None:
    assert Rules(Robots(text="User-agent: *\nCrawl-delay: 2.5")).delay == 2.5
    assert Rules(Robots(text="User-agent: other\nCrawl-delay: 2.5")).delay == 0.0


@pytest.mark.parametrize(
    ("tags", "directive"),
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
def test_opt_out_directives_in_x_robots_tag(tags: list[str], directive: str) -> None:
    assert opt_out(tags) == (f"X-Robots-Tag: {directive}" if directive else "")


def test_tdm_reservation_header() -> None:
    assert opt_out([], "1") and not opt_out([], "0")


def test_robots_txt_is_requested_once_for_all_workers(server: Any) -> None:
    server.robots = (200, b"User-agent: *\nDisallow: /n/\nAllow: /n/1\n")
    answers = fetch(*(f"{server.url}/n/{n}.jpg" for n in range(1, 21)), workers=4)
    assert sorted({answer.kind for answer in answers}) == ["ok", "opted_out"]
    assert server.robots_asked == 1
    assert all(path.startswith("/n/1") for path in server.requests) and len(server.requests) == 11


def test_opt_out_headers_are_obeyed_unless_robots_is_off(server: Any) -> None:
    urls = [f"{server.url}/{path}" for path in ("tagged/noai", "tagged/googlebot:+noai", "reserved", "tagged/noml")]
    assert [answer.kind for answer in fetch(*urls)] == ["opted_out", "ok", "opted_out", "opted_out"]
    without_robots = FetchSettings(**{**vars(QUICK), "robots": False})
    server.robots = (200, b"User-agent: *\nDisallow: /\n")
    assert {answer.kind for answer in fetch(*urls, settings=without_robots)} == {"ok"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, "ok"), (403, "ok"), (204, "ok"), (500, "unasked"), (503, "unasked"), (429, "unasked")],
)
def test_a_missing_robots_txt_allows_everything_and_a_failing_one_nothing(server: Any, status: int, kind: str) -> None:
    server.robots = (status, b"User-agent: *\nDisallow: /\n" if status != 204 else b"")
    (answer, *_) = answers = fetch(*(f"{server.url}/n/{n}.jpg" for n in range(5)))
    assert {answer.kind for answer in answers} == {kind}
    if kind == "ok":
        assert server.robots_asked == 1
    else:
        # Requests at 0 s, 0.1 s, 0.3 s and at the end of the patience.
        assert 2 <= server.robots_asked <= 4
        assert not server.requests and "robots.txt" in answer.reason and answer.attempts == 0


def test_a_long_robots_txt_is_read_up_to_the_size_limit(server: Any) -> None:
    rules = b"User-agent: *\nDisallow: /n/\n"
    server.robots = (200, rules + b"#" * MAX_BYTES * 3)
    assert fetch(f"{server.url}/n/1.jpg")[0].kind == "opted_out"


def test_a_redirect_is_followed_only_if_the_target_site_allows_it(server: Any, second_server: Any) -> None:
    server.elsewhere = f"{second_server.url}/n/1.jpg"
    second_server.robots = (200, b"User-agent: lavic\nDisallow: /n/\n")
    assert fetch(f"{server.url}/away")[0].kind == "opted_out"
    assert not second_server.requests
    second_server.robots = (404, b"")
    assert fetch(f"{server.url}/away")[0].kind == "ok"


def test_a_crawl_delay_of_a_day_fails_only_that_hosts_photos(server: Any, second_server: Any) -> None:
    server.robots = (200, b"User-agent: *\nCrawl-delay: 86400\nDisallow: /n/7.jpg\n")
    urls = [f"{host.url}/n/{n}.jpg" for n in range(20) for host in (server, second_server)]
    answers = dict(zip(urls, fetch(*urls), strict=True))
    assert {answer.kind for url, answer in answers.items() if url.startswith(second_server.url)} == {"ok"}
    slow = {url: answer for url, answer in answers.items() if url.startswith(server.url)}
    assert slow.pop(f"{server.url}/n/7.jpg").kind == "opted_out" and not server.requests
    assert all(answer.kind == "throttled" and "Crawl-delay" in answer.reason for answer in slow.values())
