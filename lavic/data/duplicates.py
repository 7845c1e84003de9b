"""Photos that a set does not store again, since another photo of it has the same bytes: one sidecar per shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lavic.data.tar_shards import Sample, beside
from lavic.errors import DataError
from lavic.storage.atomic import atomic_write
from lavic.storage.paths import sizes

ENDING = "references.jsonl"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A photo whose bytes stand under another key."""

    key: str
    same_as: str
    """Key of the sample with the bytes."""
    shard: str
    """Name of the tar that holds it."""
    meta: dict[str, Any]
    """What would be the json member."""
    text: str
    """What would be the txt member."""

    def sample(self, stored: Sample) -> Sample:
        """The photo as a sample, from the one that has its bytes."""
        return Sample(key=self.key, item_id=self.meta["item_id"], jpg=stored.jpg, meta=self.meta, text=self.text)


def references_path(shard: Path) -> Path:
    """Where a shard's references stand: `x-000000.tar` -> `x-000000.references.jsonl`."""
    return beside(shard, ENDING)


def read_references(shard: Path) -> list[Reference]:
    """The references of a shard; none where it has no such sidecar.

    Raises:
        DataError: A line is not a reference.
    """
    path = references_path(shard)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return parse_references(data, path)


def parse_references(data: bytes, path: Path) -> list[Reference]:
    """The references in the bytes of a sidecar, which is at `path`.

    Raises:
        DataError: A line is not a reference.
    """
    try:
        references = [Reference(**json.loads(line)) for line in data.decode().split("\n") if line]
        for row in references:
            if not all(isinstance(value, str) for value in (row.key, row.same_as, row.shard, row.text)):
                raise ValueError("a value is not text")
            if not isinstance(row.meta, dict):
                raise ValueError("its json member is no object")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: broken references ({error}); run the crawl of this set again") from None
    return references


def read_all_references(folder: Path) -> list[Reference]:
    """The references of a set, shards without a tar included."""
    names = sorted(name for name in sizes(folder) if name.endswith(f".{ENDING}"))
    return [row for name in names for row in read_references(folder / f"{name.removesuffix(ENDING)}tar")]


def write_references(shard: Path, references: Iterable[Reference]) -> str:
    """Write a shard's references whole; no file where there is none. Returns the sha256 of the file, or nothing."""
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in references)
    if lines:
        atomic_write(references_path(shard), lines)
        return hashlib.sha256(lines.encode()).hexdigest()
    references_path(shard).unlink(missing_ok=True)
    return ""
