"""One shard: order, ledger, seal, retry, and what is left after a stop at any point. No Ray needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lavic.data.ledger import ledger_path
from lavic.data.tar_shards import index_path, read_samples
from lavic.errors import DataError
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.image.normalize import PhotoSettings
from lavic.shards.pack.outcomes import KINDS, advice, outcome_table, read_ledger
from lavic.shards.pack.seal import read_seal, seal_path
from lavic.shards.pack.shard_writer import pack_shard
from lavic.shards.plan.crawl_plan import Plan, make_plan, read_tasks, tasks_path
from lavic.shards.plan.photo_tasks import PlanSettings
from lavic.storage.paths import file_sizes
from tests.shards.fault_server import PHOTOS

FETCH = FetchSettings(
    allow_private=True, concurrency=8, deadline=1.0, max_bytes=1_000_000, retries=1, backoff=0.01, host_rate=0
)
PHOTO = PhotoSettings()

FAULTS = {
    "plain.jpg": "ok",
    "status/404": "gone",
    "rotated.jpg": "ok",
    "status/403": "forbidden",
    "status/429": "throttled",
    "slow": "timeout",
    "clear.png": "ok",
    "big.jpg": "too_big",
    "page.jpg": "not_image",
    "cut.jpg": "truncated",
    "short": "truncated",
    "bomb.png": "bomb",
    "apple.jpg": "unsupported",
    "to-file": "bad_url",
    "hang-up": "connect",
    "status/500": "http_error",
    "animated.gif": "ok",
    "tall.png": "unsupported",
    "dot.gif": "placeholder",
    "https://m.media-amazon.com/images/I/01RmK+J4pJL._AC_SL1500_.gif": "placeholder",
}


def plan_of(catalogue: Path, out: Path) -> Plan:
    settings = PlanSettings(set="t", split="train", photos_per_shard=1000, photos="first", image_size="large")
    return make_plan((str(catalogue),), out, settings)


def bytes_of(shard: Path) -> tuple[bytes, bytes]:
    return shard.read_bytes(), index_path(shard).read_bytes()


def test_a_shard_whose_file_of_tasks_was_cut_stays_as_it_is(tmp_path: Path, catalogue: Callable[..., Path]) -> None:
    plan = plan_of(catalogue("plain.jpg", "rotated.jpg"), tmp_path / "out")
    shard, settings = plan.shard(0), plan.digested_settings(0)
    seal = pack_shard(shard, plan.digests[0], FETCH, PHOTO, plan_settings=settings)
    before = bytes_of(shard)
    tasks = tasks_path(shard)
    tasks.write_bytes(tasks.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(DataError, match="not the file that was planned"):
        pack_shard(shard, plan.digests[0], FETCH, PHOTO, ("gone",), plan_settings=settings)
    assert bytes_of(shard) == before and read_seal(shard, plan.digests[0], file_sizes(plan.folder)) == seal


def test_every_photo_has_its_row_and_good_ones_are_undisturbed(tmp_path: Path, catalogue: Callable[..., Path]) -> None:
    plan = plan_of(catalogue(*FAULTS), tmp_path / "out")
    shard = plan.shard(0)
    seal = pack_shard(shard, plan.digests[0], FETCH, PHOTO)
    rows = read_ledger(shard)
    assert [row.kind for row in rows] == list(FAULTS.values())
    assert [row.key for row in rows] == [task.key for task in read_tasks(plan.shard(0))]
    assert all((row.reason == "") == (row.kind == "ok") for row in rows)
    samples = list(read_samples(shard))
    assert [sample.key for sample in samples] == [row.key for row in rows if row.kind == "ok"]
    assert seal.entry.samples == 4 == seal.outcomes["ok"] and seal.photos == len(FAULTS)
    assert (
        read_seal(shard, plan.digests[0], file_sizes(plan.folder)) == seal
        and read_seal(shard, "another plan", file_sizes(plan.folder)) is None
    )
    for sample in samples:
        assert sample.meta["sha256"] == hashlib.sha256(sample.jpg).hexdigest() and sample.title.startswith("Item")
        assert sample.image.size == (64, 48) == (sample.meta["width"], sample.meta["height"])


def test_order_does_not_depend_on_speed(tmp_path: Path, catalogue: Callable[..., Path], server: Any) -> None:
    paths = [f"n/{n}.jpg" for n in range(300)]
    plan = plan_of(catalogue(*paths), tmp_path / "a")
    pack_shard(plan.shard(0), plan.digests[0], FETCH, PHOTO)
    server.delay = 0.002
    again = plan_of(catalogue(*paths), tmp_path / "b")
    pack_shard(again.shard(0), again.digests[0], FetchSettings(allow_private=True, concurrency=50, host_rate=0), PHOTO)
    assert bytes_of(plan.shard(0)) == bytes_of(again.shard(0))
    assert [sample.item_id for sample in read_samples(plan.shard(0))] == [f"B{n:05d}" for n in range(300)]


def test_a_picture_is_fetched_from_another_host_if_the_first_one_fails(
    tmp_path: Path,
    catalogue: Callable[..., Path],
    server: Any,
    second_server: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As of Amazon's images, whose id is the same on every host.
    monkeypatch.setattr("lavic.shards.plan.task_spool.picture_of", lambda url: url.partition("#")[2])
    one, other = server.url, second_server.url
    links = [f"{one}/status/404#a", f"{one}/plain.jpg#a", f"{other}/grey.jpg#a", f"{other}/plain.jpg#a"]
    links += [f"{one}/status/404#b", f"{other}/status/403#b", f"{one}/status/500#b"]
    links += [f"{one}/plain.jpg#c", f"{other}/grey.jpg#c"]
    plan = plan_of(catalogue(*links), tmp_path / "out")
    shard = plan.shard(0)
    pack_shard(shard, plan.digests[0], FETCH, PHOTO)
    rows = read_ledger(shard)
    # The first photo that can be fetched stands for the picture; without one, each link that was tried has its row.
    assert [(row.kind, row.attempts) for row in rows] == [
        *(("ok", 0), ("ok", 0), ("ok", 1), ("ok", 0)),
        *(("gone", 1), ("forbidden", 1), ("gone", 0)),
        *(("ok", 1), ("ok", 0)),
    ]
    assert [row.url for row in rows] == links and len({row.sha256 for row in rows if row.kind == "ok"}) == 2
    samples = list(read_samples(shard))
    assert [sample.meta["url"] for sample in samples] == [*links[:4], *links[7:]]
    assert {sample.jpg for sample in samples[:4]} == {PHOTOS["grey.jpg"]}
    assert second_server.requests == {"/grey.jpg": 1, "/status/403": 1}


def test_retry_fetches_the_named_failures_alone(tmp_path: Path, catalogue: Callable[..., Path], server: Any) -> None:
    paths = [*(f"n/{n}.jpg" for n in range(9)), "status/404"]
    plan = plan_of(catalogue(*paths), tmp_path / "out")
    shard = plan.shard(0)
    server.broken = True
    assert pack_shard(shard, plan.digests[0], FETCH, PHOTO).outcomes == {"gone": 1, "http_error": 3, "ok": 6}
    server.broken = False
    server.requests.clear()
    assert pack_shard(shard, plan.digests[0], FETCH, PHOTO, ("http_error",)).outcomes == {"gone": 1, "ok": 9}
    assert set(server.requests) == {"/n/0.jpg", "/n/3.jpg", "/n/6.jpg"}
    undisturbed = plan_of(catalogue(*paths), tmp_path / "undisturbed")
    pack_shard(undisturbed.shard(0), undisturbed.digests[0], FETCH, PHOTO)
    assert bytes_of(shard) == bytes_of(undisturbed.shard(0))


def test_a_ledger_that_was_not_written_any_more_comes_out_the_same(
    tmp_path: Path, catalogue: Callable[..., Path], server: Any
) -> None:
    paths = [f"n/{n}.jpg" for n in range(6)]
    plan = plan_of(catalogue(*paths, paths[2], paths[2]), tmp_path / "out")
    shard = plan.shard(0)
    pack_shard(shard, plan.digests[0], FETCH, PHOTO)
    rows = {row.key: (row.kind, row.bytes, row.sha256, row.same_as) for row in read_ledger(shard)}
    assert sorted(row[3] for row in rows.values() if row[3]) == ["B00002_0"] * 2
    # as if it had been killed between the index and the ledger
    seal_path(shard).unlink()
    ledger_path(shard).unlink()
    server.requests.clear()
    pack_shard(shard, plan.digests[0], FETCH, PHOTO)
    assert not server.requests
    assert {row.key: (row.kind, row.bytes, row.sha256, row.same_as) for row in read_ledger(shard)} == rows


def test_a_retry_cut_short_keeps_what_was_stored(tmp_path: Path, catalogue: Callable[..., Path], server: Any) -> None:
    plan = plan_of(catalogue(*(f"n/{n}.jpg" for n in range(6))), tmp_path / "out")
    shard = plan.shard(0)
    pack_shard(shard, plan.digests[0], FETCH, PHOTO)
    before, rows = bytes_of(shard), read_ledger(shard)
    seal_path(shard).unlink()
    ledger_path(shard).unlink()
    server.requests.clear()
    pack_shard(shard, plan.digests[0], FETCH, PHOTO)
    assert not server.requests and bytes_of(shard) == before
    assert [(row.key, row.kind, row.sha256) for row in read_ledger(shard)] == [(r.key, r.kind, r.sha256) for r in rows]


@pytest.mark.parametrize("damage", ["flip", "cut", "garbage"])
def test_damaged_photos_are_fetched_again(
    tmp_path: Path, catalogue: Callable[..., Path], server: Any, damage: str
) -> None:
    plan = plan_of(catalogue(*(f"n/{n}.jpg" for n in range(6))), tmp_path / "out")
    shard = plan.shard(0)
    pack_shard(shard, plan.digests[0], FETCH, PHOTO)
    before = bytes_of(shard)
    data = bytearray(before[0])
    data[700] ^= 1
    shard.write_bytes({"flip": bytes(data), "cut": before[0][:3000], "garbage": b"no tar"}[damage])
    seal_path(shard).unlink()
    pack_shard(shard, plan.digests[0], FETCH, PHOTO)
    assert bytes_of(shard) == before


def test_a_shard_without_a_photo_has_a_ledger_and_no_tar(tmp_path: Path, catalogue: Callable[..., Path]) -> None:
    plan = plan_of(catalogue("status/404", "page.jpg"), tmp_path / "out")
    seal = pack_shard(plan.shard(0), plan.digests[0], FETCH, PHOTO)
    assert not plan.shard(0).exists() and seal.entry.samples == 0 and len(read_ledger(plan.shard(0))) == 2
    assert read_seal(plan.shard(0), plan.digests[0], file_sizes(plan.folder)) == seal


def test_a_seal_needs_its_files(tmp_path: Path, catalogue: Callable[..., Path]) -> None:
    plan = plan_of(catalogue("plain.jpg"), tmp_path / "out")
    shard = plan.shard(0)
    pack_shard(shard, plan.digests[0], FETCH, PHOTO)
    seal_path(shard).write_text(seal_path(shard).read_text()[:-9])
    assert read_seal(shard, plan.digests[0], file_sizes(plan.folder)) is None
    pack_shard(shard, plan.digests[0], FETCH, PHOTO)
    shard.write_bytes(shard.read_bytes() + b"x")
    assert read_seal(shard, plan.digests[0], file_sizes(plan.folder)) is None


def test_the_table_and_the_advice() -> None:
    text = outcome_table({"ok": 900, "gone": 10, "timeout": 90})
    assert text.index("ok") < text.index("timeout") < text.index("gone") and "90.0%" in text
    assert advice({"ok": 95, "gone": 5}) == "" and advice({"ok": 3}) == ""
    assert "--fetch.allow-private with --retry blocked_address" in advice({"blocked_address": 10})
    assert "--retry blocked_address requests again" in advice({"blocked_address": 10}, allow_private=True)
    assert "7 of 10 ended as throttled" in advice({"ok": 3, "throttled": 7})
    assert "--retry connect dns timeout" in advice({"ok": 3, "connect": 3, "dns": 2, "timeout": 2, "gone": 4})
    assert all(advice({"ok": 1, kind: 9}) and kind in outcome_table({kind: 1}) for kind in KINDS[1:])
