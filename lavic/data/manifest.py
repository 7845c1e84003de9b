"""The manifest of a set of shards: written last, so that a set which has one is whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lavic.data.atomic import write_whole
from lavic.data.shards import Sample, ShardWriter
from lavic.errors import DataError

FORMAT = "lavic-shards/1"
NAME = "manifest.json"
SIZES = "sizes.json"
"""Samples by shard, in the form that open_clip reads."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard of a set."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a set consists of."""

    folder: Path
    set: str
    split: str
    shards: tuple[ShardEntry, ...]
    """The shards that hold a sample, in the order of their names."""
    plan: str = ""
    """Digest of the plan that the set was made from: equal digests, equal shards."""
    outcomes: Mapping[str, int] = field(default_factory=dict)
    """What became of the planned photos: number by kind, failures too."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages that made it."""

    @property
    def samples(self) -> int:
        """Photos in the set."""
        return sum(shard.samples for shard in self.shards)

    def path(self, shard: ShardEntry) -> Path:
        """Where a shard's tar stands."""
        return self.folder / shard.name

    def save(self) -> None:
        """Write `sizes.json`, the dataset card and, last, the manifest."""
        body = {"format": FORMAT, "samples": self.samples, **asdict(self)}
        del body["folder"]
        sizes = {shard.name: shard.samples for shard in self.shards}
        write_whole(self.folder / SIZES, json.dumps(sizes, indent=1) + "\n")
        write_whole(self.folder / "README.md", _card(self))
        write_whole(self.folder / NAME, json.dumps(body, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path, *, check: bool = True) -> Manifest:
        """Read a set's manifest.

        Args:
            folder: Where it stands.
            check: Also see that every shard is there with its size.

        Raises:
            DataError: There is no whole set in the folder.
        """
        folder = Path(folder)
        path = folder / NAME
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of shards")
        if not path.is_file():
            raise DataError(f"{folder}: no {NAME}, so not a whole set; if a crawl stopped, run the same command again")
        try:
            body: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if body.pop("format") != FORMAT:
                raise DataError(f"{path}: not in the form {FORMAT}; made by another version of lavic")
            samples = body.pop("samples")
            body["shards"] = tuple(ShardEntry(**shard) for shard in body["shards"])
            manifest = cls(folder=folder, **body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: broken manifest ({error})") from None
        if samples != manifest.samples:
            raise DataError(f"{path}: broken manifest (says {samples} samples, its shards hold {manifest.samples})")
        for shard in manifest.shards if check else ():
            place = manifest.path(shard)
            size = place.stat().st_size if place.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, not {shard.bytes}"
                raise DataError(f"{place} {found}; `lavic verify {folder}` lists every difference")
        return manifest


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


def shard_name(set: str, split: str, number: int) -> str:
    """`<set>-<split>-NNNNNN.tar`."""
    return f"{set}-{split}-{number:06d}.tar"


def _card(manifest: Manifest) -> str:
    """The few lines by which `datasets.load_dataset(FOLDER)` finds the shards and leaves the rest alone."""
    return f"""---
configs:
- config_name: default
  data_files:
  - split: {manifest.split}
    path: "*.tar"
---
# {manifest.set}, {manifest.split}

{manifest.samples:,} product photos in {len(manifest.shards)} WebDataset shards, written by `lavic crawl`.
Read them with `webdataset`, `datasets.load_dataset(FOLDER)` or `ray.data.read_webdataset`; check them with
`lavic verify FOLDER`.
"""
