"""Shards whose hosts are in trouble: what is asked, in which order, and what is left. No Ray needed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lavic.cli import main
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import read_samples
from lavic.shards.cluster import progress, worker
from lavic.shards.cluster.ray_job import _rounds
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.http.robots import Robots
from lavic.shards.image.normalize import PhotoSettings
from lavic.shards.pack.outcomes import Outcome, read_ledger
from lavic.shards.pack.seal import Seal
from lavic.shards.pack.shard_writer import pack_shard
from lavic.shards.plan.crawl_plan import Plan, make_plan
from lavic.shards.plan.photo_tasks import PlanSettings
from lavic.shards.ratelimit.coordinator import Coordinator
from lavic.shards.ratelimit.host_limiter import HostReport, Limits
from tests.shards.fault_server import FaultServer
from tests.shards.pack.test_shard_writer import bytes_of

pytestmark = pytest.mark.slow

FETCH = FetchSettings(
    allow_private=True, concurrency=8, deadline=1.0, retries=1, backoff=0.01, host_rate=0, patience=2.0, robots=False
)


def plan_of(catalogue: Path, out: Path, photos_per_shard: int = 1000) -> Plan:
    settings = PlanSettings(
        set="t", split="train", photos_per_shard=photos_per_shard, photos="first", image_size="large"
    )
    return make_plan((str(catalogue),), out, settings)


def crawl(
    plan: Plan,
    fetch: FetchSettings = FETCH,
    retry: tuple[str, ...] = (),
    coordinator: Coordinator | None = None,
    **more: Any,
) -> list[Seal]:
    """One worker makes all shards, one after the other, with one budget."""
    coordinator = coordinator or Coordinator(fetch.limits)
    return [
        pack_shard(plan.shard(number), digest, fetch, PhotoSettings(), retry, coordinator=coordinator, **more)
        for number, digest in enumerate(plan.digests)
    ]


def rows_of(plan: Plan) -> list[Outcome]:
    return [row for number in range(len(plan.digests)) for row in read_ledger(plan.shard(number))]


@pytest.mark.parametrize(("status", "kind"), [(500, "http_error"), (1, "connect"), (503, "throttled")])
def test_dead_links_at_the_head_of_a_shard_do_not_close_the_host(
    tmp_path: Path, catalogue: Callable[..., Path], server: Any, status: int, kind: str
) -> None:
    # A host that refuses is asked for one photo a second in the end: of such there are fewer here.
    dead = 9 if status == 503 else 100
    server.fails = lambda number: status if number < dead else 0
    plan = plan_of(catalogue(*(f"n/{n}.jpg" for n in range(3 * dead))), tmp_path / "out")
    began = time.monotonic()
    crawl(plan)
    assert Counter(row.kind for row in rows_of(plan)) == {"ok": 2 * dead, kind: dead}
    assert time.monotonic() - began < 30 and all(row.attempts == 2 for row in rows_of(plan) if row.kind == kind)


def test_shards_of_dead_links_alone_do_not_close_the_host_for_those_after_them(
    tmp_path: Path, catalogue: Callable[..., Path], server: Any
) -> None:
    server.fails = lambda number: 500 if number < 120 else 0
    plan = plan_of(catalogue(*(f"n/{n}.jpg" for n in range(150))), tmp_path / "out", photos_per_shard=15)
    crawl(plan, FetchSettings(**{**vars(FETCH), "patience": 0.5, "host_rate": 200.0}))
    kinds = Counter((row.kind, row.url.rpartition("/")[2] < "120.jpg") for row in rows_of(plan))
    good = [row for row in rows_of(plan) if int(row.url.rpartition("/")[2][:-4]) >= 120]
    assert {row.kind for row in good} == {"ok"} and len(good) == 30, kinds
    left = [row for row in rows_of(plan) if row.kind == "unasked"]
    assert left and all(row.attempts == 0 and "HTTP 500" in row.reason for row in left)
    # The next run asks for those alone that were not asked for, and for them first.
    server.fails = lambda number: 0
    server.requests.clear()
    crawl(plan)
    assert {row.kind for row in rows_of(plan)} == {"ok", "http_error"}
    assert set(server.requests) == {f"/n/{row.url.rpartition('/')[2]}" for row in left}


def test_a_retry_begins_elsewhere(tmp_path: Path, catalogue: Callable[..., Path], server: Any) -> None:
    plan = plan_of(catalogue(*(f"n/{n}.jpg" for n in range(60))), tmp_path / "out")
    server.fails = lambda number: 500 if number < 30 else 0
    crawl(plan)
    # The others were damaged on the disk since: they are new, and known to be there.
    plan.shard(0).write_bytes(b"no tar")
    order: list[int] = []
    server.fails = lambda number: (order.append(number), 500 if number < 30 else 0)[1]
    crawl(plan, FetchSettings(**{**vars(FETCH), "concurrency": 1, "retries": 0}), retry=("http_error",))
    assert order == [*range(30, 60), *range(30)]


def test_a_few_photos_that_are_always_refused_do_not_slow_their_host_down(
    tmp_path: Path, catalogue: Callable[..., Path], server: Any
) -> None:
    server.fails = lambda number: 503 if number % 20 == 7 else 0
    plan = plan_of(catalogue(*(f"n/{n}.jpg" for n in range(400))), tmp_path / "out")
    fetch = FetchSettings(**{**vars(FETCH), "host_rate": 100.0, "backoff": 0.5})
    (seal,) = crawl(plan, fetch)
    assert seal.outcomes == {"ok": 380, "throttled": 20}
    # 420 requests at 100 a second: halved once, and raised by 100 in a minute, they would take 6.4 s.
    assert seal.ended - seal.began < 6.2


def test_a_host_that_goes_down_leaves_photos_for_the_next_run(
    tmp_path: Path, catalogue: Callable[..., Path], server: Any
) -> None:
    plan = plan_of(catalogue(*(f"n/{n}.jpg" for n in range(200))), tmp_path / "out")
    paths = tmp_path / "undisturbed"
    undisturbed = plan_of(tmp_path / "meta.jsonl", paths)
    crawl(undisturbed)
    served = []

    def fails(number: int) -> int:
        served.append(number)
        if len(served) == 50:
            server.close()
        return int(len(served) >= 50)

    server.fails = fails
    crawl(plan, FetchSettings(**{**vars(FETCH), "patience": 0.1, "retries": 2}))
    kinds = Counter(row.kind for row in rows_of(plan))
    # Photos that were on their way when it went down may have failed for good.
    assert kinds["ok"] == 49 and kinds["unasked"] >= 100 and kinds["unasked"] + kinds["connect"] == 151
    again = FaultServer(port=int(server.url.rpartition(":")[2]))
    crawl(plan, retry=("connect",))
    again.close()
    assert sum(again.requests.values()) == 151 and bytes_of(plan.shard(0)) == bytes_of(undisturbed.shard(0))


def test_a_shard_that_only_waits_for_a_slow_host_is_left_and_made_whole_later(
    tmp_path: Path, catalogue: Callable[..., Path], server: Any, second_server: Any
) -> None:
    second_server.robots = (200, b"User-agent: *\nCrawl-delay: 1.2\n")
    urls = [f"{second_server.url if n % 40 == 0 else server.url}/n/{n}.jpg" for n in range(200)]
    plan = plan_of(catalogue(*urls), tmp_path / "out")
    fetch = FetchSettings(**{**vars(FETCH), "robots": True})
    coordinator = Coordinator(fetch.limits)
    (left,) = crawl(plan, fetch, coordinator=coordinator, defer_after=0.3)
    assert 1 <= left.left == left.outcomes["unasked"] <= 4 and left.outcomes["ok"] == 200 - left.left
    assert all("slow" in row.reason for row in rows_of(plan) if row.kind == "unasked")
    fetched = sum(server.requests.values())
    (seal,) = crawl(plan, fetch, coordinator=coordinator)
    assert seal.outcomes == {"ok": 200} and not seal.left and sum(server.requests.values()) == fetched == 195
    gaps = [later - earlier for earlier, later in zip(second_server.times, second_server.times[1:], strict=False)]
    assert sum(gap > 1.1 for gap in gaps) >= 4
    assert [sample.item_id for sample in read_samples(plan.shard(0))] == [f"B{n:05d}" for n in range(200)]


def test_one_slow_host_holds_up_no_shard_of_another(
    tmp_path: Path, catalogue: Callable[..., Path], server: Any, second_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_DEFER_AFTER_S", 0.3)
    server.robots = (200, b"User-agent: *\nCrawl-delay: 1.5\n")
    urls = [f"{server.url if n < 3 else second_server.url}/n/{n}.jpg" for n in range(43)]
    words = ["--items", str(catalogue(*urls)), "--out", str(tmp_path / "out"), "--photos-per-shard", "10"]
    words += ["--executor", "local", "--ray.workers", "1", "--fetch.allow-private", "--fetch.host-rate", "0"]
    assert main(["crawl", *words]) == 0
    assert len(server.requests) == 3 and sum(server.requests.values()) == 3
    assert max(second_server.times) < server.times[-1], "one worker, and the slow host's shard is the first"
    assert [ShardDataset(tmp_path / "out")[n].item_id for n in range(43)] == [f"B{n:05d}" for n in range(43)]


def test_shards_that_are_left_are_made_when_the_others_are_and_waited_for_longer_each_time() -> None:
    rows = [worker.shard_row(number, f"{number}.tar", "", "", "") for number in range(5)]
    rounds = []

    def make(rows: Any) -> Any:
        rounds.append([(row["number"], row["defer_after"], row["deferred"]) for row in rows])
        for row in rows:
            yield {"number": row["number"], "left": int(row["number"] < 3 and row["defer_after"] <= 20.0)}

    assert [row["number"] for row in _rounds(rows, 2, make)] == [3, 4, 0, 1, 2]
    assert rounds == [
        [(number, 5.0, False) for number in range(5)],
        [(number, 20.0, True) for number in range(3)],
        [(number, 80.0, True) for number in range(3)],
    ]
    assert list(_rounds(rows[:2], 2, make)) and rounds[-1] == [(0, float("inf"), False), (1, float("inf"), False)]


def test_a_crawl_that_stands_still_says_what_it_waits_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavic.tracking.progress._LOG_S", 0.01)
    monkeypatch.setattr(progress, "_STALLED_S", 0.02)
    clock = [0.0]
    coordinator = Coordinator(Limits(patience=60.0), clock=lambda: clock[0])

    async def trouble() -> dict[str, str]:
        await coordinator.get_robots("http://a.example", "w")
        await coordinator.put_robots("http://a.example", Robots(kind="http_error", reason="HTTP 500"))
        await coordinator.sync("w", {"b.example": HostReport(waiting=1), "c.example": HostReport(waiting=1)}, [])
        await coordinator.sync("w", {"b.example": HostReport(retry_after=30.0)}, [])
        return await coordinator.wait_reasons()

    waits = asyncio.run(trouble())
    assert waits == {
        "b.example": "the host asks to wait 30 s",
        "http://a.example": "robots.txt cannot be read: HTTP 500",
    }
    requested = threading.Event()

    def ask() -> dict[str, str]:
        requested.set()
        return waits

    with progress.CrawlProgress(10, waits=ask):
        assert requested.wait(10)
    output = capsys.readouterr().err
    assert (
        "0/10 photos (0%), ? photos/s, ? left, waiting for b.example (the host asks to wait 30 s) and 1 more hosts"
        in output
    )
    clock[0] = 31.0
    asyncio.run(coordinator.put_robots("http://a.example", Robots()))
    assert asyncio.run(coordinator.wait_reasons()) == {}
