"""Sets in which equal bytes are stored once: the same whatever came first, and read as if every photo were there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lavic.data.duplicates import read_references
from lavic.data.manifest import Manifest
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import read_samples
from lavic.errors import LavicError
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.pack.dedup import deduplicate
from lavic.shards.pack.seal import read_seal, seal_path
from lavic.shards.plan.crawl_plan import make_plan
from lavic.shards.plan.photo_tasks import PlanSettings
from lavic.shards.store_photos import StorePhotos
from lavic.shards.verify import verify
from lavic.storage.paths import file_sizes
from tests.crawled_sets import crawl_here

FETCH = FetchSettings(allow_private=True, concurrency=4, deadline=20.0, retries=0, backoff=0.01, host_rate=0)
SETTINGS = PlanSettings(
    set="t", split="train", photos_per_shard=4, photos="first", image_size="large", duplicates="referenced"
)
NUMBERS = [20 * n for n in range(10)]
# The server draws a number and the number 65,536 higher alike: other links, the same bytes.
PATHS = [f"n/{n}.jpg" for n in (*NUMBERS[:6], *(65536 + n for n in NUMBERS[2:8]), *(131072 + n for n in NUMBERS))]
ONCE = 10


def tar_bytes(folder: Path) -> dict[str, bytes]:
    endings = (".tar", ".idx", ".references.jsonl", "manifest.json")
    return {name: (folder / name).read_bytes() for name in sorted(file_sizes(folder)) if name.endswith(endings)}


@pytest.fixture
def undisturbed(tmp_path: Path, catalogue: Callable[..., Path]) -> Path:
    crawl_here(make_plan((str(catalogue(*PATHS)),), tmp_path / "undisturbed", SETTINGS), FETCH)
    return tmp_path / "undisturbed"


def test_equal_bytes_are_stored_once_and_every_photo_is_there(undisturbed: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(undisturbed)
    assert (manifest.samples, manifest.references) == (ONCE, len(PATHS) - ONCE) and verify(manifest) == []
    data = ShardDataset(undisturbed)
    assert len({sample.meta["sha256"] for sample in map(data.__getitem__, range(ONCE))}) == ONCE
    assert data.keys == [f"B{n:05d}_0" for n in (*range(6), 10, 11, 20, 21)]
    for key, reference in data.references.items():
        sample = reference.sample(data[data.keys.index(reference.same_as)])
        assert sample.key == key and sample.meta["item_id"] == sample.item_id == key.removesuffix("_0")
        assert sample.meta["sha256"] == data[data.keys.index(reference.same_as)].meta["sha256"]
    # What makes item tokens finds every item.
    photos = StorePhotos.of([data], {}, tmp_path / "store")
    keys = sorted(key for shard in range(len(photos)) for key in photos.keys(shard))
    assert keys == [f"B{n:05d}_0" for n in range(len(PATHS))]


def test_which_one_is_stored_does_not_depend_on_what_came_first(
    tmp_path: Path, catalogue: Callable[..., Path], undisturbed: Path, server: Any
) -> None:
    plan = make_plan((str(catalogue(*PATHS)),), tmp_path / "backwards", SETTINGS)
    crawl_here(plan, FETCH, order=range(len(plan.digests) - 1, -1, -1))
    assert tar_bytes(plan.folder) == tar_bytes(undisturbed)
    # A third of the numbers fails at first: others keep the bytes, until those are there too.
    again = make_plan((str(catalogue(*PATHS)),), tmp_path / "again", SETTINGS)
    server.broken = True
    crawl_here(again, FETCH)
    assert verify(Manifest.load(again.folder)) == [] and tar_bytes(again.folder) != tar_bytes(undisturbed)
    server.broken = False
    crawl_here(again, FETCH, retry=("http_error",))
    assert tar_bytes(again.folder) == tar_bytes(undisturbed)
    server.requests.clear()
    crawl_here(again, FETCH)
    assert not server.requests


def test_a_shard_that_refers_is_made_again_without_fetching(undisturbed: Path, server: Any, tmp_path: Path) -> None:
    before = tar_bytes(undisturbed)
    plan = make_plan((str(tmp_path / "meta.jsonl"),), undisturbed, SETTINGS)
    for number in range(len(plan.digests)):
        seal_path(plan.shard(number)).unlink()
    server.requests.clear()
    crawl_here(plan, FETCH)
    assert tar_bytes(undisturbed) == before and not server.requests


def test_bytes_that_are_lost_are_fetched_again(undisturbed: Path, server: Any, tmp_path: Path) -> None:
    before = tar_bytes(undisturbed)
    plan = make_plan((str(tmp_path / "meta.jsonl"),), undisturbed, SETTINGS)
    assert read_references(plan.shard(3)) and list(read_samples(plan.shard(0)))
    plan.shard(0).unlink()
    assert any(
        "refers to" in line or "cannot be read" in line for line in verify(Manifest.load(undisturbed, check=False))
    )
    seal_path(plan.shard(3)).unlink()
    server.requests.clear()
    crawl_here(plan, FETCH)
    assert tar_bytes(undisturbed) == before and server.requests


def test_photos_lost_between_two_steps_are_said(undisturbed: Path, tmp_path: Path) -> None:
    plan = make_plan((str(tmp_path / "meta.jsonl"),), undisturbed, SETTINGS)
    seals = [read_seal(plan.shard(n), digest, file_sizes(plan.folder)) for n, digest in enumerate(plan.digests)]
    broken = [replace(seal, references="other") for seal in seals if seal]
    plan.shard(0).write_bytes(plan.shard(0).read_bytes()[:700])
    with pytest.raises(LavicError, match=r"photo B00000_0 is lost; run the same command again"):
        deduplicate(plan, broken)
    crawl_here(plan, FETCH)
    assert verify(Manifest.load(undisturbed)) == []
