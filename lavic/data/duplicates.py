"""Duplicates: photos that a set does not store, because another of its photos has the same bytes.

One sidecar per shard refers to the stored photos.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lavic.data.tar_shards import Sample, sidecar_path
from lavic.errors import DataError
from lavic.storage.atomic import atomic_write

ENDING = "references.jsonl"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A photo whose bytes are stored under another key."""

    key: str
    same_as: str
    """Key of the sample with the bytes."""
    shard: str
    """Name of that sample's tar."""
    meta: dict[str, Any]
    """The photo's json member."""
    text: str
    """The photo's txt member."""

    def sample(self, stored: Sample) -> Sample:
        """The photo as a sample, with the bytes of the stored one."""
        return Sample(key=self.key, item_id=self.meta["item_id"], jpg=stored.jpg, meta=self.meta, text=self.text)


def references_path(shard: Path) -> Path:
    """The path of a shard's references: `x-000000.tar` -> `x-000000.references.jsonl`."""
    return sidecar_path(shard, ENDING)


def read_references(shard: Path) -> list[Reference]:
    """The references of a shard; none without a sidecar. Raises DataError as `parse_references`."""
    path = references_path(shard)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return parse_references(data, path)


def parse_references(data: bytes, path: Path) -> list[Reference]:
    """The references in the content of a sidecar; `path` is for messages. Raises DataError for an invalid line."""
    try:
        references = [Reference(**json.loads(line)) for line in data.decode().split("\n") if line]
        for row in references:
            if not all(isinstance(value, str) for value in (row.key, row.same_as, row.shard, row.text)):
                raise ValueError("a value is not text")
            if not isinstance(row.meta, dict):
                raise ValueError("its json member is not an object")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: broken references ({error}); run the crawl of this set again") from None
    return references


def write_references(shard: Path, references: Iterable[Reference]) -> str:
    """Writes a shard's references, or removes the file if there are none. Returns the file's sha256, or ""."""
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in references)
    if lines:
        atomic_write(references_path(shard), lines)
        return hashlib.sha256(lines.encode()).hexdigest()
    references_path(shard).unlink(missing_ok=True)
    return ""
