"""Drawn product photos, packed as a set, for the tests of `lavic describe` and `lavic embed`."""

from __future__ import annotations

import io
import json
from pathlib import Path

from lavic.data.descriptions import descriptions_path
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample
from lavic.mini.drawing import COLOURS, KINDS, PATTERNS, draw


def photo(item: int, number: int = 0, size: tuple[int, int] = (96, 96)) -> Sample:
    """A drawn photo of an item: its first one is number 0."""
    kind, colour, pattern = KINDS[item % 6], list(COLOURS)[item % 10], PATTERNS[item % 4]
    file = io.BytesIO()
    draw(kind, colour, pattern, seed=100 * number + item).resize(size).save(file, "JPEG", quality=92)
    item_id, title = f"B0MN{item:06d}", f"Acme {kind.title()}"
    return Sample.of(item_id=item_id, n=number, jpg=file.getvalue(), title=title, width=size[0], height=size[1])


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a set."""
    manifest = ShardDataset(folder).manifest
    return [manifest.path(entry) for entry in manifest.shards]


def read_rows(shard: Path) -> list[dict[str, str]]:
    """The descriptions of a shard."""
    return [json.loads(line) for line in descriptions_path(shard).read_text().splitlines()]
