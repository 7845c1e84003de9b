"""Sets of samples that are already at hand, for tests that read sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from lavic.data.manifest import Manifest, ShardEntry, shard_name
from lavic.data.shards import Sample, ShardWriter


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
        entries.append(ShardEntry(name=path.name, samples=writer.samples, bytes=writer.bytes, sha256=writer.sha256))
    manifest = Manifest(folder=folder, set=set, split=split, shards=tuple(entries))
    manifest.save()
    return manifest
