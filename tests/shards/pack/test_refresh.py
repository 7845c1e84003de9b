"""`lavic crawl --refresh`: what has changed is stored anew, all else stays as it is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from lavic.cli import main
from lavic.data.shard_dataset import ShardDataset
from lavic.shards.image.near_duplicates import NAME as NEAR_DUPLICATES
from lavic.shards.pack.outcomes import Outcome, read_ledger
from lavic.shards.pack.refresh import FILE, conditional_headers
from tests.shards.fault_server import encoded, send
from tests.shards.test_crawl import QUICK

pytestmark = pytest.mark.slow

ITEMS = 12


class Shop:
    """A server whose photos have versions: even ones an ETag, odd ones a date, every sixth neither."""

    def __init__(self) -> None:
        self.versions = dict.fromkeys(range(ITEMS), 1)
        self.status: dict[int, int] = {}
        self.answers: list[tuple[int, int]] = []
        """(photo, status) of every answer."""
        self.fail_after: int | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                name = self.path.strip("/").partition(".")[0]
                if not name.isdigit():
                    return send(self, 404)
                number = int(name)
                version = outer.versions[number]
                marks = {"ETag": f'W/"{number}-{version}"'} if number % 2 == 0 else {}
                marks = marks or {"Last-Modified": f"Thu, 0{version} Jan 2026 00:00:00 GMT"}
                marks = {} if number % 6 == 0 else marks
                sent = {"ETag": self.headers["If-None-Match"], "Last-Modified": self.headers["If-Modified-Since"]}
                same = marks and all(sent[mark] == value for mark, value in marks.items())
                status = outer.status.get(number, 304 if same else 200)
                outer.answers.append((number, status))
                if status == 304:
                    self.send_response(304)
                    return self.end_headers()
                photo = encoded(Image.new("RGB", (40, 40), (number, 80 * version % 256, 9)))
                return send(self, status, photo if status == 200 else b"", marks)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def statuses(self) -> dict[int, int]:
        answers, self.answers = dict(self.answers), []
        return answers


@pytest.fixture
def shop() -> Iterator[Shop]:
    running = Shop()
    yield running
    running.server.shutdown()
    running.server.server_close()


def files(out: Path, *endings: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name.endswith(endings)}


def rows(out: Path) -> dict[int, Outcome]:
    return {int(row.item_id[1:]): row for path in sorted(out.glob("*.tar")) for row in read_ledger(path)}


@pytest.fixture
def crawl(tmp_path: Path, catalogue: Callable[..., Path], shop: Shop) -> Callable[..., int]:
    items = catalogue(*(f"{shop.url}/{n}.jpg" for n in range(ITEMS)))
    words = ["crawl", "--items", str(items), "--out", str(tmp_path / "out"), "--photos-per-shard", "4", *QUICK]
    return lambda *more: main([*words, *more])


def test_what_changed_is_stored_anew_and_shards_without_a_change_keep_their_bytes(
    tmp_path: Path, crawl: Callable[..., int], shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert crawl() == 0
    before, first = files(out, ".tar", ".idx", "manifest.json"), rows(out)
    assert first[2].etag == 'W/"2-1"' and first[1].last_modified == "Thu, 01 Jan 2026 00:00:00 GMT"
    assert first[6].etag == first[6].last_modified == ""
    shop.statuses()

    # Nothing has changed: 304, but for photos that have nothing to tell by.
    capsys.readouterr()
    assert crawl("--refresh") == 0
    assert shop.statuses() == {n: 200 if n % 6 == 0 else 304 for n in range(ITEMS)}
    assert files(out, ".tar", ".idx", "manifest.json") == before and rows(out) == first
    text = capsys.readouterr().out
    assert "refreshed: 12 photos unchanged, 0 changed\n" in text and f"this run: {ITEMS} photos" in text
    assert not (out / FILE).exists()

    # In the second shard two photos change, in the third two cannot be had.
    shop.versions |= {5: 2, 6: 2}
    shop.status = {8: 404, 9: 500}
    assert crawl("--refresh") == 0
    assert "10 changed" not in (text := capsys.readouterr().out) and "8 photos unchanged, 2 changed, 2 could" in text
    now, after = files(out, ".tar", ".idx"), rows(out)
    assert {name for name in now if now[name] != before[name]} == {"photos-train-000001.tar"}
    dataset = ShardDataset(out)
    assert len(dataset) == ITEMS and {row.kind for row in after.values()} == {"ok"}
    assert [dataset[n].image.getpixel((0, 0))[1] > 120 for n in range(ITEMS)] == [n in (5, 6) for n in range(ITEMS)]
    assert after[5].last_modified == "Thu, 02 Jan 2026 00:00:00 GMT" and after[5].sha256 != first[5].sha256
    assert after[8].refresh_failed == "gone: HTTP 404" and after[9].refresh_failed == "http_error: HTTP 500"
    assert after[8].sha256 == first[8].sha256 and after[8].etag == first[8].etag
    assert main(["verify", str(out)]) == 0

    # They are back as they were: nothing is left to say of them.
    shop.status = {}
    assert crawl("--refresh") == 0
    assert files(out, ".tar", ".idx") == now and not any(row.refresh_failed for row in rows(out).values())


def test_a_report_of_near_duplicates_goes_with_the_set_that_it_describes(
    tmp_path: Path, crawl: Callable[..., int], shop: Shop
) -> None:
    report = tmp_path / "out" / NEAR_DUPLICATES
    assert crawl("--near-duplicates") == 0 and report.exists()
    assert crawl() == 0 and report.exists()
    shop.versions[5] = 2
    assert crawl("--refresh") == 0 and not report.exists()
    assert crawl("--near-duplicates") == 0 and report.exists()


def test_a_refresh_that_was_interrupted_goes_on_and_then_begins_anew(
    tmp_path: Path, crawl: Callable[..., int], shop: Shop
) -> None:
    out = tmp_path / "out"
    assert crawl() == 0
    before = files(out, ".tar", ".idx")
    shop.statuses()
    # The last shard cannot be put in place.
    tar = out / "photos-train-000002.tar"
    tar.unlink()
    tar.mkdir()
    assert crawl("--refresh", "--ray.workers", "1") == 1
    assert (out / FILE).exists() and not (out / "manifest.json").exists()
    assert shop.statuses().keys() >= set(range(8))
    tar.rmdir()
    assert crawl("--refresh") == 0
    assert shop.statuses().keys() == set(range(8, 12))
    assert files(out, ".tar", ".idx") == before and not (out / FILE).exists()
    assert crawl("--refresh") == 0
    assert shop.statuses().keys() == set(range(12))
    assert crawl() == 0 and not shop.statuses()


def test_photos_that_show_one_picture_are_asked_for_once(
    tmp_path: Path, catalogue: Callable[..., Path], shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    items = catalogue(*[f"{shop.url}/2.jpg"] * 3, f"{shop.url}/1.jpg")
    words = ["crawl", "--items", str(items), "--out", str(tmp_path / "out"), *QUICK]
    assert main(words) == 0
    before = files(tmp_path / "out", ".tar")
    assert main([*words, "--dry-run", "--refresh"]) == 0
    assert "4 photos in 1 shards, by 2 requests" in capsys.readouterr().out
    shop.answers.clear()
    assert main([*words, "--refresh"]) == 0
    assert sorted(shop.answers) == [(1, 304), (2, 304)] and files(tmp_path / "out", ".tar") == before
    shop.versions[2] = 2
    shop.answers.clear()
    assert main([*words, "--refresh"]) == 0
    assert sorted(shop.answers) == [(1, 304), (2, 200)]
    dataset = ShardDataset(tmp_path / "out")
    assert len({dataset[n].meta["sha256"] for n in range(3)}) == 1 and dataset[0].image.getpixel((0, 0))[1] > 120
    assert [json.loads(line)["same_as"] for line in (tmp_path / "out").glob("*.ledger.jsonl").__next__().open()] == [
        "",
        "B00000_0",
        "B00000_0",
        "",
    ]


def test_conditions() -> None:
    row = Outcome(key="a", item_id="a", n=0, url="u", kind="ok", etag='"x"', last_modified="then")
    assert conditional_headers(row) == {"If-None-Match": '"x"', "If-Modified-Since": "then"}
    assert conditional_headers(Outcome(key="a", item_id="a", n=0, url="u", kind="ok")) == {}
