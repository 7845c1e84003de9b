"""`lavic reddit` with short links: resolved on request, cached, followed to known hosts only, at a limited rate."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lavic.cli import main
from lavic.data.reddit.splits import NAMES
from lavic.shards.reddit_build.short_links import Resolver
from lavic.shards.reddit_settings import ShortLinkSettings
from tests.data.reddit.reddit_dumps import (
    ITEMS,
    comment,
    dp,
    submission,
    write_dump,
)
from tests.shards.reddit_command import reddit_argv, write_catalogue

pytestmark = pytest.mark.slow


class ShortLinkServer:
    """Answers for short links as their hosts do."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.times: list[float] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.paths.append(self.path)
                outer.times.append(time.monotonic())
                target = {
                    "/amzn.to/toItem1": (301, f"https://www.amazon.com/Title/dp/{ITEMS[7]}?tag=x"),
                    "/a.co/d/twoHops": (302, "https://amzn.to/toItem1"),
                    "/amzn.to/search1": (301, "https://www.amazon.com/s?k=soap"),
                    "/amzn.to/evilOne": (302, "http://169.254.169.254/latest"),
                    "/amzn.to/noMore1": (404, ""),
                }.get(self.path, (500, ""))
                self.send_response(target[0])
                if target[1]:
                    self.send_header("Location", target[1])
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def short_links() -> Iterator[ShortLinkServer]:
    server = ShortLinkServer()
    yield server
    server.close()


def test_short_links_are_resolved_only_on_request_and_cached(tmp_path: Path, short_links: ShortLinkServer) -> None:
    folder = write_catalogue(tmp_path)
    codes = ["https://amzn.to/toItem1", "https://a.co/d/twoHops", "https://amzn.to/search1", "https://amzn.to/broken1"]
    rows, posts = [], []
    for n, code in enumerate(codes):
        posts.append(submission(f"s{n}", f"Which number {n}?"))
        rows.append(comment(f"c{n}", f"s{n}", f"t3_s{n}", f"this is great {code}"))
    posts.append(submission("s9", "Which?"))
    rows.append(comment("c9", "s9", "t3_s9", f"this is great {dp(ITEMS[1])}"))
    dumps = [write_dump(tmp_path / "s.zst", posts), write_dump(tmp_path / "c.zst", rows)]
    assert main(reddit_argv(folder, dumps, tmp_path / "plain")) == 0
    assert not short_links.paths
    assert json.loads((tmp_path / "plain" / "funnel.json").read_text())["lines"]["short_link_only"] == 4
    options = ["--short-links.resolve", "--short-links.server", short_links.address, "--short-links.rate", "50"]
    options += ["--short-links.cache", str(tmp_path / "cache.jsonl")]
    assert main(reddit_argv(folder, dumps, tmp_path / "a", *options)) == 0
    rows_made = [row for name in NAMES for row in (tmp_path / "a" / f"{name}.jsonl").read_text().splitlines()]
    assert sorted(json.loads(row)["gt_items"][0] for row in rows_made) == [ITEMS[1], ITEMS[7], ITEMS[7]]
    notes = json.loads((tmp_path / "a" / "funnel.json").read_text())["notes"]
    assert (notes["short_links"], notes["short_links_distinct"], notes["short_links_not_resolved"]) == (2, 4, 1)
    requested_before = len(short_links.paths)
    assert main(reddit_argv(folder, dumps, tmp_path / "b", *options)) == 0
    assert short_links.paths[requested_before:] == ["/amzn.to/broken1"], "cached links are not requested again"
    assert (tmp_path / "b" / "train.jsonl").read_bytes() == (tmp_path / "a" / "train.jsonl").read_bytes()


def test_the_resolver_follows_known_hosts_only_within_rate_and_limit(
    tmp_path: Path, short_links: ShortLinkServer
) -> None:
    settings = ShortLinkSettings(resolve=True, rate=20, server=short_links.address, limit=3)
    resolver = Resolver(settings, tmp_path / "cache.jsonl")
    for code in ("evilOne", "noMore1", "search1", "toItem1"):
        resolver.resolve(f"https://amzn.to/{code}")
    assert short_links.paths == ["/amzn.to/evilOne", "/amzn.to/noMore1", "/amzn.to/search1"]
    assert [resolver.known(f"https://amzn.to/{code}") for code in ("evilOne", "noMore1", "toItem1")] == ["", "", None]
    # A late request shortens the gap that the server sees: half of the expected time is the bound.
    assert short_links.times[-1] - short_links.times[0] >= 0.05


def test_a_result_that_was_cut_is_requested_again(tmp_path: Path, short_links: ShortLinkServer) -> None:
    cache = tmp_path / "short_links.jsonl"
    settings = ShortLinkSettings(resolve=True, rate=100, server=short_links.address)
    urls = ["https://amzn.to/toItem1", "https://amzn.to/noMore1"]
    for url in urls:
        Resolver(settings, cache).resolve(url)
    whole = cache.read_bytes()
    for cut in range(1, len(whole) + 1):
        cache.write_bytes(whole[:cut])
        resolver = Resolver(settings, cache)
        for url in urls:
            resolver.resolve(url)
        assert [resolver.known(url) for url in urls] == [ITEMS[7], ""]
        assert sorted(cache.read_bytes().splitlines()) == sorted(whole.splitlines())
