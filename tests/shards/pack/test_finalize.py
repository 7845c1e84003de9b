"""The end of a crawl: when a set counts as whole, and what is said of it. No Ray needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lavic.data.ledger import ledger_path
from lavic.data.manifest import EMPTY_TAR, Manifest
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import index_path
from lavic.errors import DataError
from lavic.shards.cluster.progress import CrawlProgress
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.pack import finalize
from lavic.shards.pack.finalize import TooFewStored, finalize_set, print_report
from lavic.shards.pack.outcomes import read_ledger, success_rate, write_ledger
from lavic.shards.pack.seal import read_seal
from lavic.shards.plan.crawl_plan import Plan, make_plan
from lavic.shards.plan.photo_tasks import PlanSettings
from lavic.shards.verify import verify
from tests.crawled_sets import crawl_here

FETCH = FetchSettings(allow_private=True, host_rate=0, retries=0)


def plan_of(items: Path, out: Path, photos_per_shard: int = 4) -> Plan:
    settings = PlanSettings(set="t", split="x", photos_per_shard=photos_per_shard, photos="first", image_size="large")
    return make_plan((str(items),), out, settings)


def test_a_remnant_is_not_a_whole_set(
    tmp_path: Path, catalogue: Callable[..., Path], server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers that 3 divides fail at first: 4 of 10 photos, besides one that is gone."""
    plan = plan_of(catalogue(*(f"n/{n}.jpg" for n in range(10)), "status/404"), tmp_path / "out")
    server.broken = True
    assert crawl_here(plan, FETCH, min_success=0.6).outcomes == {"gone": 1, "http_error": 4, "ok": 6}
    with pytest.raises(TooFewStored) as caught:
        crawl_here(plan, FETCH, min_success=0.61)
    message = str(caught.value)
    assert message.startswith(f"{plan.folder}: 6 of 10 photos stored (60.0%") and "--min-success 0.61" in message
    assert "--retry http_error" in message and "--min-success 0.6" in message
    assert "http_error" in capsys.readouterr().out
    # The manifest of the run before must not stand for what this one refuses; the shards are kept.
    assert not (plan.folder / "manifest.json").exists() and plan.shard(0).exists()
    with pytest.raises(DataError, match="the set is not complete"):
        ShardDataset(plan.folder)
    server.broken = False
    server.requests.clear()
    assert crawl_here(plan, FETCH, retry=("http_error",), min_success=1.0).samples == 10
    assert len(server.requests) == 4 and verify(Manifest.load(plan.folder)) == []


def test_what_could_not_be_had_does_not_count() -> None:
    assert success_rate({"ok": 1, "gone": 5, "opted_out": 3, "placeholder": 1}) == 1.0
    assert success_rate({"ok": 1, "timeout": 1, "gone": 5}) == 0.5
    assert success_rate({"ok": 1, "unasked": 3}) == 0.25, "a dead host's photos are no success"
    assert success_rate({"gone": 3}) == success_rate({}) == 1.0


def test_nothing_stored_is_never_whole(tmp_path: Path, catalogue: Callable[..., Path]) -> None:
    plan = plan_of(catalogue("status/404", "status/403"), tmp_path / "out")
    with pytest.raises(TooFewStored, match="not one photo was stored"):
        crawl_here(plan, FETCH)
    assert not (plan.folder / "manifest.json").exists()


def test_shards_without_a_photo_leave_no_gap(tmp_path: Path, catalogue: Callable[..., Path], server: Any) -> None:
    """Of four shards the first and the third have no photo: a tar without a member each, until a retry fills it."""
    paths = ["status/404", "n/0.jpg", "n/1.jpg", "n/2.jpg", "n/3.jpg", "n/6.jpg", "n/4.jpg"]
    plan = plan_of(catalogue(*paths), tmp_path / "out", photos_per_shard=2)
    server.broken = True
    manifest = crawl_here(plan, FETCH)
    assert manifest.empty == ("t-x-000000.tar", "t-x-000002.tar") and manifest.samples == 3
    assert [plan.shard(n).exists() for n in range(4)] == [True] * 4
    assert (
        plan.shard(0).read_bytes() == plan.shard(2).read_bytes() == EMPTY_TAR and not index_path(plan.shard(0)).exists()
    )
    sizes = json.loads((plan.folder / "sizes.json").read_text())
    assert sizes == {f"t-x-00000{n}.tar": count for n, count in enumerate((0, 2, 0, 1))} and list(sizes) == sorted(
        sizes
    )
    assert verify(manifest) == [] and [sample.item_id for sample in ShardDataset(plan.folder)] == [
        f"B0000{n}" for n in (2, 3, 6)
    ]
    stat = plan.shard(0).stat()
    assert crawl_here(plan, FETCH) == manifest and plan.shard(0).stat().st_ino == stat.st_ino, "written once"
    plan.shard(2).write_bytes(b"\0" * 9999 + b"x" + b"\0" * 240)
    assert verify(manifest) == [f"{plan.shard(2)}: not the empty tar of a shard without a photo"]
    plan.shard(2).unlink()
    assert verify(manifest) == [f"{plan.shard(2)}: not the empty tar of a shard without a photo"]
    assert crawl_here(plan, FETCH) == manifest and verify(manifest) == []
    server.broken = False
    filled = crawl_here(plan, FETCH, retry=("http_error",))
    assert filled.empty == () and [shard.samples for shard in filled.shards] == [1, 2, 2, 1] and verify(filled) == []


def test_an_upgrade_of_packages_changes_no_digest(
    tmp_path: Path, catalogue: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(catalogue("n/1.jpg", "n/2.jpg"), tmp_path / "out")
    first = crawl_here(plan, FETCH)
    before = (plan.folder / "manifest.json").read_bytes()
    monkeypatch.setattr(finalize, "versions", lambda *names: dict.fromkeys(names, "99.0"))
    assert crawl_here(plan, FETCH) == first and (plan.folder / "manifest.json").read_bytes() == before
    (plan.folder / "manifest.json").unlink()
    upgraded = crawl_here(plan, FETCH)
    assert upgraded.versions["ray"] == "99.0" and upgraded.digest == first.digest
    assert replace(first, outcomes={"ok": 1}).digest != first.digest


def test_photos_never_asked_for_are_counted_with_their_reasons(
    tmp_path: Path, catalogue: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(catalogue("n/1.jpg", "n/2.jpg", "status/404", "status/410"), tmp_path / "out")
    crawl_here(plan, FETCH)
    rows = read_ledger(plan.shard(0))
    reasons = ["", "", "a.example: 500 since 12:00", "b.example: no answer"]
    rows = [replace(row, kind="unasked" if why else "ok", reason=why) for row, why in zip(rows, reasons, strict=True)]
    write_ledger(plan.shard(0), rows)
    seal = read_seal(plan.shard(0), plan.digests[0], {path.name: path.stat().st_size for path in plan.folder.iterdir()})
    assert seal
    seal = replace(seal, outcomes={"ok": 2, "unasked": 2})
    capsys.readouterr()
    print_report(finalize_set(plan, [seal], 0.5), [seal], [seal], 4, 1.0)
    out = capsys.readouterr().out
    assert "2 photos were never requested: a.example: 500 since 12:00 (1); b.example: no answer (1)." in out
    assert "Run the same command again" in out
    with pytest.raises(TooFewStored):
        finalize_set(plan, [seal], 0.51)
    assert "2 photos were never requested: a.example: 500 since 12:00 (1); " in capsys.readouterr().out


def test_figures_are_those_of_this_run(
    tmp_path: Path, catalogue: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(catalogue("n/1.jpg", "n/2.jpg", "n/3.jpg"), tmp_path / "out")
    manifest = crawl_here(plan, FETCH)
    seal = read_seal(plan.shard(0), plan.digests[0], {path.name: path.stat().st_size for path in plan.folder.iterdir()})
    assert seal
    capsys.readouterr()
    print_report(manifest, [seal], [replace(seal, began=10.0, ended=12.0)], 2, 3.0)
    assert "this run: 2 photos in 3.0 s with start-up; 1 photos/s from first to last" in capsys.readouterr().out
    print_report(manifest, [seal], [], 0, 3.0)
    assert "this run" not in capsys.readouterr().out


def test_progress_rates_only_what_this_run_does() -> None:
    """Two shards, of which earlier runs settled 60 and 30 of 100 photos each: 110 are left."""
    progress = CrawlProgress(200, [{"ok": 60}, {"ok": 20, "gone": 10}])
    assert progress.outcomes.total() == 90 and progress.rate == 0.0
    progress._idle -= 10.0  # as if nothing had been there ten seconds ago
    progress._count_partial({0: {"ok": 50, "timeout": 1}})
    assert progress.outcomes == {"ok": 80, "gone": 10, "timeout": 1} and 0.01 < progress.rate <= 0.1
    progress._count_partial({})
    progress.add(1, {"ok": 85, "gone": 15}, began=0.0)
    assert progress.outcomes == {"ok": 145, "gone": 15}
    progress.add(0, {"ok": 50, "truncated": 50}, began=0.0)
    assert progress.outcomes == {"ok": 135, "gone": 15, "truncated": 50}


def test_a_ledger_that_is_gone_is_named(tmp_path: Path, catalogue: Callable[..., Path]) -> None:
    plan = plan_of(catalogue("n/1.jpg"), tmp_path / "out")
    manifest = crawl_here(plan, FETCH)
    ledger_path(plan.shard(0)).unlink()
    assert verify(manifest)[0] == f"{ledger_path(plan.shard(0))}: is missing"
