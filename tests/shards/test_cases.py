"""Inputs of bug reports, crawled. Other tests have inputs of the same kinds."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavic.cli import main
from lavic.data.manifest import Manifest
from lavic.data.shard_dataset import ShardDataset
from lavic.errors import DataError
from lavic.shards.pack.outcomes import read_ledger
from lavic.shards.plan.crawl_plan import make_plan, read_tasks
from lavic.shards.plan.photo_tasks import PlanSettings
from tests.external import EXTERNAL

CASES = EXTERNAL / "cases/crawl"
SETTINGS = PlanSettings(
    set="cases", split="train", photos_per_shard=1000, photos="all", image_size="hi_res", text="auto"
)
pytestmark = [pytest.mark.external, pytest.mark.slow]


def case(name: str) -> tuple[str, ...]:
    return (str(CASES / "cat" / name),)


@pytest.fixture
def serve() -> Iterator[Callable[..., None]]:
    """Starts the cases' own server, with a raw answer to robots.txt or none, until the test ends."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*robots: str) -> None:
        words = [sys.executable, str(CASES / "serve.py"), *(str(CASES / "http" / name) for name in robots)]
        server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        running.append(server)
        while server.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", 18099), timeout=1):
                return
            time.sleep(0.05)
        pytest.fail("the server of the cases does not start: is port 18099 taken?")

    yield start
    for server in running:
        server.kill()
        server.wait()


def crawl(items: str, out: Path, *words: str) -> int:
    """`lavic crawl` of a case, without retries where a link goes nowhere."""
    fast = ("--fetch.allow-private", "--fetch.retries", "0", "--fetch.deadline", "5", "--photos-per-shard", "10")
    return main(["crawl", "--items", *case(items), "--out", str(out), *fast, *words])


def outcomes(out: Path) -> Counter[str]:
    return Counter(Manifest.load(out).outcomes)


def test_a_photo_that_is_no_jpeg_by_its_size_stops_nothing(serve, tmp_path: Path) -> None:
    serve()
    assert crawl("tall.jsonl", tmp_path / "out") == 0
    assert outcomes(tmp_path / "out") == {"ok": 30, "unsupported": 1}


def test_dead_links_at_the_head_of_a_catalogue_keep_no_good_ones_from_being_fetched(serve, tmp_path: Path) -> None:
    serve()
    assert crawl("deadfirst.jsonl", tmp_path / "out") == 0
    assert outcomes(tmp_path / "out") == {"ok": 60, "http_error": 40}


def test_odd_photos_are_stored_once_upright(serve, tmp_path: Path) -> None:
    serve()
    assert crawl("photos.jsonl", tmp_path / "out") == 0
    assert outcomes(tmp_path / "out") == {"ok": 8, "placeholder": 1}
    manifest = Manifest.load(tmp_path / "out")
    rows = {row.url.rpartition("/")[2]: row for row in read_ledger(manifest.path(manifest.shards[0]))}
    assert rows["1x1.gif"].kind == "placeholder"
    data = ShardDataset(tmp_path / "out")
    photos = {sample.meta["url"].rpartition("/")[2]: sample for sample in map(data.__getitem__, range(len(data)))}
    with Image.open(CASES / "img" / "turned6.tif") as upright:  # which Pillow turns when it loads
        upright.load()
        expected = np.asarray(upright.convert("RGB"), dtype=float)
    stored = np.asarray(photos["turned6.tif"].image, dtype=float)
    assert stored.shape == expected.shape and np.abs(stored - expected).mean() < 3


def test_odd_answers_and_links_are_taken(serve, tmp_path: Path) -> None:
    """All but one: a link without a scheme takes https, which the server does not speak."""
    serve()
    assert crawl("answers.jsonl", tmp_path / "out", "--fetch.patience", "0") == 0
    assert outcomes(tmp_path / "out")["ok"] == 11


@pytest.mark.parametrize(
    ("robots", "kind"), [("robots_ce_empty.http", "opted_out"), ("robots_delay.http", "throttled")]
)
def test_what_robots_txt_says_is_heeded_and_said(serve, tmp_path: Path, capsys, robots: str, kind: str) -> None:
    serve(robots)
    assert crawl("robots.jsonl", tmp_path / "out") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert kind in capsys.readouterr().out


def test_a_shard_without_a_photo_leaves_no_hole_in_the_names(serve, tmp_path: Path) -> None:
    serve()
    assert crawl("hole.jsonl", tmp_path / "out", "--min-success", "0") == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert names == [f"photos-train-{number:06d}.tar" for number in range(3)]


def test_overlays_crops_and_views_are_pictures_of_their_own(tmp_path: Path) -> None:
    plan = make_plan(case("amazon_forms.jsonl"), tmp_path / "out", SETTINGS)
    assert (plan.counts.photos, plan.counts.shared) == (8, 0)


@pytest.mark.parametrize(
    ("name", "urls"),
    [
        ("bom_item2meta.json", [0, 1, 2, 3]),
        ("isgz.jsonl", [0, 1, 2, 3]),
        ("none_text.jsonl", [1]),
        ("[2023] raw/meta.jsonl", [0, 1, 2, 3]),
        ("[2023] raw/*.jsonl", [0, 1, 2, 3]),
    ],
)
def test_catalogues_as_people_have_them(tmp_path: Path, name: str, urls: list[int]) -> None:
    plan = make_plan(case(name), tmp_path / "out", SETTINGS)
    assert [task.url for task in read_tasks(plan.shard(0))] == [f"http://127.0.0.1:18099/g/{n}.jpg" for n in urls]
    assert plan.counts.rejected == 0 and all(task.text == task.title for task in read_tasks(plan.shard(0)))


def test_what_is_nested_too_deep_is_one_rejected_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no photo to fetch: 0 items, 1 records cannot be read, see .*rejected\.jsonl"):
        make_plan(case("deep.json"), tmp_path / "out", SETTINGS)


def test_ids_with_a_mark_and_line_ends_of_windows(tmp_path: Path) -> None:
    settings = replace(SETTINGS, ids=case("ids_bom.txt")[0])
    plan = make_plan(case("bom_item2meta.json"), tmp_path / "out", settings)
    assert (plan.counts.photos, plan.counts.ids_missing) == (2, 0)
