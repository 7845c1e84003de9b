"""Sets in which equal bytes are stored once: the same whatever came first, and read as if every photo were there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lavic.data.dataset import ShardDataset
from lavic.data.manifest import Manifest
from lavic.data.place import sizes
from lavic.data.references import read_references
from lavic.data.shards import read_samples
from lavic.errors import LavicError
from lavic.shards.embed import first_photos
from lavic.shards.fetch import FetchSettings
from lavic.shards.pack import Seal, pack_shard, read_seal, seal_path
from lavic.shards.photo import PhotoSettings
from lavic.shards.plan import Plan, make_plan
from lavic.shards.refer import refer
from lavic.shards.tasks import PlanSettings
from lavic.shards.verify import verify

FETCH = FetchSettings(allow_private=True, concurrency=4, deadline=20.0, retries=0, backoff=0.01, host_rate=0)
SETTINGS = PlanSettings(
    set="t", split="train", photos_per_shard=4, photos="first", image_size="large", duplicates="referenced"
)
NUMBERS = [20 * n for n in range(10)]
# The server draws a number and the number 65,536 higher alike: other links, the same bytes.
PATHS = [f"n/{n}.jpg" for n in (*NUMBERS[:6], *(65536 + n for n in NUMBERS[2:8]), *(131072 + n for n in NUMBERS))]
ONCE = 10


def made(plan: Plan, order: Sequence[int] | None = None, retry: tuple[str, ...] = ()) -> list[Seal]:
    """What a crawl does, shard after shard in some order."""
    numbers = range(len(plan.digests))
    for number in order or numbers:
        shard, digest = plan.shard(number), plan.digests[number]
        seal = read_seal(shard, digest, sizes(plan.folder))
        if seal is None or any(map(seal.outcomes.get, retry)):
            pack_shard(shard, digest, FETCH, PhotoSettings(), retry)
    seals = [read_seal(plan.shard(number), plan.digests[number], sizes(plan.folder)) for number in numbers]
    done = refer(plan, [seal for seal in seals if seal])
    entries = tuple(seal.entry for seal in done if seal.entry.samples)
    ok = sum(seal.outcomes.get("ok", 0) for seal in done)
    outcomes: dict[str, int] = {}
    for seal in done:
        for kind, count in seal.outcomes.items():
            outcomes[kind] = outcomes.get(kind, 0) + count
    stored = sum(entry.samples for entry in entries)
    Manifest(
        folder=plan.folder, set="t", split="train", shards=entries, plan=plan.digest, outcomes=outcomes,
        references=ok - stored,
    ).save()  # fmt: skip
    return done


def whole(folder: Path) -> dict[str, bytes]:
    endings = (".tar", ".idx", ".references.jsonl", "manifest.json")
    return {name: (folder / name).read_bytes() for name in sorted(sizes(folder)) if name.endswith(endings)}


@pytest.fixture
def undisturbed(tmp_path: Path, catalogue: Callable[..., Path]) -> Path:
    made(make_plan((str(catalogue(*PATHS)),), tmp_path / "undisturbed", SETTINGS))
    return tmp_path / "undisturbed"


def test_equal_bytes_are_stored_once_and_every_photo_is_there(undisturbed: Path) -> None:
    manifest = Manifest.load(undisturbed)
    assert (manifest.samples, manifest.references) == (ONCE, len(PATHS) - ONCE) and verify(manifest) == []
    data = ShardDataset(undisturbed)
    assert len({sample.meta["sha256"] for sample in map(data.__getitem__, range(ONCE))}) == ONCE
    assert data.keys == [f"B{n:05d}_0" for n in (*range(6), 10, 11, 20, 21)]
    for key, one in data.references.items():
        sample = one.sample(data[data.keys.index(one.same_as)])
        assert sample.key == key and sample.meta["item_id"] == sample.item_id == key.removesuffix("_0")
        assert sample.meta["sha256"] == data[data.keys.index(one.same_as)].meta["sha256"]
    # What makes item tokens finds every item.
    photos = [photo for part in first_photos([data]) for photo in part]
    assert sorted(key for _, _, key in photos) == [f"B{n:05d}_0" for n in range(len(PATHS))]


def test_which_one_is_stored_does_not_depend_on_what_came_first(
    tmp_path: Path, catalogue: Callable[..., Path], undisturbed: Path, server: Any
) -> None:
    plan = make_plan((str(catalogue(*PATHS)),), tmp_path / "backwards", SETTINGS)
    made(plan, range(len(plan.digests) - 1, -1, -1))
    assert whole(plan.folder) == whole(undisturbed)
    # A third of the numbers fails at first: others keep the bytes, until those are there too.
    again = make_plan((str(catalogue(*PATHS)),), tmp_path / "again", SETTINGS)
    server.broken = True
    made(again)
    assert verify(Manifest.load(again.folder)) == [] and whole(again.folder) != whole(undisturbed)
    server.broken = False
    made(again, retry=("http_error",))
    assert whole(again.folder) == whole(undisturbed)
    server.requests.clear()
    made(again)
    assert not server.requests


def test_a_shard_that_refers_is_made_again_without_fetching(undisturbed: Path, server: Any, tmp_path: Path) -> None:
    before = whole(undisturbed)
    plan = make_plan((str(tmp_path / "meta.jsonl"),), undisturbed, SETTINGS)
    for number in range(len(plan.digests)):
        seal_path(plan.shard(number)).unlink()
    server.requests.clear()
    made(plan)
    assert whole(undisturbed) == before and not server.requests


def test_bytes_that_are_lost_are_fetched_again(undisturbed: Path, server: Any, tmp_path: Path) -> None:
    before = whole(undisturbed)
    plan = make_plan((str(tmp_path / "meta.jsonl"),), undisturbed, SETTINGS)
    seals = made(plan)
    assert read_references(plan.shard(3)) and list(read_samples(plan.shard(0)))
    plan.shard(0).unlink()
    assert any(
        "refers to" in line or "cannot be read" in line for line in verify(Manifest.load(undisturbed, check=False))
    )
    seal_path(plan.shard(3)).unlink()
    server.requests.clear()
    made(plan)
    assert whole(undisturbed) == before and server.requests and len(seals) == len(plan.digests)


def test_photos_lost_between_two_steps_are_said(undisturbed: Path, tmp_path: Path) -> None:
    plan = make_plan((str(tmp_path / "meta.jsonl"),), undisturbed, SETTINGS)
    seals = made(plan)
    broken = [Seal(**{**vars(seal), "references": "other"}) for seal in seals]
    plan.shard(0).write_bytes(plan.shard(0).read_bytes()[:700])
    with pytest.raises(LavicError, match=r"photo B00000_0 is lost; run the same command again"):
        refer(plan, broken)
    made(plan)
    assert verify(Manifest.load(undisturbed)) == []
