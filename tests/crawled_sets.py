"""Sets of samples that are already at hand, for tests that read sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from lavic.data.manifest import Manifest, ShardEntry, shard_name
from lavic.data.tar_shards import Sample
from lavic.data.tar_writer import ShardWriter
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.image.normalize import PhotoSettings
from lavic.shards.pack.dedup import deduplicate
from lavic.shards.pack.finalize import finalize_set
from lavic.shards.pack.seal import read_seal
from lavic.shards.pack.shard_writer import pack_shard
from lavic.shards.plan.crawl_plan import Plan
from lavic.storage.paths import file_sizes


def crawl_here(
    plan: Plan,
    fetch: FetchSettings,
    *,
    retry: tuple[str, ...] = (),
    order: Iterable[int] = (),
    min_success: float = 0.0,
) -> Manifest:
    """What `lavic crawl` does, in this process, shard after shard in some order."""
    numbers = range(len(plan.digests))
    for number in order or numbers:
        seal = read_seal(plan.shard(number), plan.digests[number], file_sizes(plan.folder))
        if seal is None or any(map(seal.outcomes.get, retry)):
            pack_shard(plan.shard(number), plan.digests[number], fetch, PhotoSettings(), retry)
    seals = [read_seal(plan.shard(number), plan.digests[number], file_sizes(plan.folder)) for number in numbers]
    existing = [seal for seal in seals if seal]
    assert len(existing) == len(seals)
    if plan.settings["duplicates"] == "referenced":
        existing = deduplicate(plan, existing)
    return finalize_set(plan, existing, min_success)


def write_set(
    folder: Path, samples: Iterable[Sample], *, set: str = "photos", split: str = "train", photos_per_shard: int = 1000
) -> Manifest:
    """Write samples that are already at hand as a whole set."""
    folder.mkdir(parents=True, exist_ok=True)
    rest: Iterator[Sample] = iter(samples)
    entries: list[ShardEntry] = []
    while chunk := list(islice(rest, photos_per_shard)):
        path = folder / shard_name(set, split, len(entries))
        with ShardWriter(path) as writer:
            for sample in chunk:
                writer.add(sample)
        entries.append(writer.entry)
    manifest = Manifest(folder=folder, set=set, split=split, shards=tuple(entries))
    manifest.save()
    return manifest
