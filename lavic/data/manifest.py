"""The manifest of a set of shards: written last, so that a set which has one is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lavic.data.atomic import write_whole
from lavic.data.place import place, sizes, storage_errors
from lavic.errors import DataError, first_line

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
    references: int = 0
    """Photos that are not stored again, since another has the same bytes; see `lavic.data.references`."""
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
        counts = {shard.name: shard.samples for shard in self.shards}
        write_whole(self.folder / SIZES, json.dumps(counts, indent=1) + "\n")
        write_whole(self.folder / "README.md", _card(self))
        write_whole(self.folder / NAME, json.dumps(body, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path, *, check: bool = True) -> Manifest:
        """Read a set's manifest.

        Args:
            folder: Where it stands: a path, or an address such as s3://bucket/prefix.
            check: Also see that every shard is there with its size.

        Raises:
            DataError: There is no whole set in the folder.
        """
        folder = place(folder)
        path = folder / NAME
        try:
            text = path.read_text("utf-8")
        except storage_errors() as error:
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise DataError(f"{path}: cannot be read ({first_line(error)})") from None
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder of shards") from None
            raise DataError(
                f"{folder}: no {NAME}, so not a whole set; if a crawl stopped, run the same command again"
            ) from None
        try:
            body: dict[str, Any] = json.loads(text)
            if body.pop("format") != FORMAT:
                raise DataError(f"{path}: not in the form {FORMAT}; made by another version of lavic")
            samples = body.pop("samples")
            body["shards"] = tuple(ShardEntry(**shard) for shard in body["shards"])
            manifest = cls(folder=folder, **body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: broken manifest ({error})") from None
        if samples != manifest.samples:
            raise DataError(f"{path}: broken manifest (says {samples} samples, its shards hold {manifest.samples})")
        found = sizes(folder) if check else {}
        for shard in manifest.shards if check else ():
            size = found.get(shard.name)
            if size != shard.bytes:
                what = "is missing" if size is None else f"has {size} bytes, not {shard.bytes}"
                raise DataError(f"{manifest.path(shard)} {what}; `lavic verify {folder}` lists every difference")
        return manifest


def digest_manifest(folder: Path) -> str:
    """The sha256 of a set's manifest: of everything in the set, since the manifest holds every shard's."""
    return hashlib.sha256((folder / NAME).read_bytes()).hexdigest()


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
