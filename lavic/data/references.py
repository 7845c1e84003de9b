"""Photos that a set does not store again, since another photo of it has the same bytes: one sidecar per shard."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lavic.data.atomic import write_whole
from lavic.data.place import sizes
from lavic.data.shards import Sample, beside
from lavic.errors import DataError

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
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return []
    try:
        return [Reference(**json.loads(line)) for line in text.split("\n") if line]
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: broken references ({error}); run the crawl of this set again") from None


def read_all_references(folder: Path) -> list[Reference]:
    """The references of a set, shards without a tar included."""
    names = sorted(name for name in sizes(folder) if name.endswith(f".{ENDING}"))
    return [found for name in names for found in read_references(folder / f"{name.removesuffix(ENDING)}tar")]


def write_references(shard: Path, references: Iterable[Reference]) -> None:
    """Write a shard's references whole; no file where there is none."""
    lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in references)
    if lines:
        write_whole(references_path(shard), lines)
    else:
        references_path(shard).unlink(missing_ok=True)
