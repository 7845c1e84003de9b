"""The photos of an item store: the first photo of each item, by shard.

They are selected once per node from the indexes of the sets; all ranks map the result, 8 bytes an item.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lavic.data.shard_dataset import ShardDataset
from lavic.storage.checksummed_json import digest_json
from lavic.storage.index.array_file import ArrayFile, ArrayWriter
from lavic.storage.index.shared import shared_index
from lavic.storage.index.text_hash import prefix_bits, with_prefix

KIND = "embed/1"
_NAME_BYTES = 16
_CHUNK = 1 << 21
"""Photos that are compared at a time."""


class Photo(NamedTuple):
    """A photo of a set."""

    data_set: int
    """Number of the set."""
    sample: int
    """Number of the sample with its bytes."""
    duplicate: int
    """Number of the duplicate; -1 for a sample."""


class StorePhotos:
    """The first photo of each item, by shard: that with the lowest number in the first set with the item.

    A duplicate belongs to the shard of its original.
    """

    def __init__(self, sets: Sequence[ShardDataset], file: ArrayFile) -> None:
        self._sets = sets
        self._indexes, self._duplicates, self._ends = file["indexes"], file["duplicates"], file["ends"]
        self.names = [bytes(name).decode() for name in file["names"]]
        """Name of each shard's part of the store."""
        self._set_of = np.repeat(np.arange(len(sets)), [len(data.manifest.shards) for data in sets])

    @classmethod
    def of(cls, sets: Sequence[ShardDataset], settings: Mapping[str, Any], out: Path) -> StorePhotos:
        """Selects the photos of a store; `settings` is everything that a token depends on besides its photo.

        Raises:
            DataError: A set is broken.
        """
        source = digest_json({"sets": [data.index.source for data in sets], "settings": settings})
        file = shared_index(lambda writer: _build(sets, settings, writer), kind=KIND, source=source, owner=out)
        return cls(sets, file)

    def __len__(self) -> int:
        """Number of shards of all sets."""
        return len(self.names)

    def of_shard(self, shard: int) -> list[Photo]:
        """The photos of a shard that are in the store."""
        rows, number = self._rows(shard), int(self._set_of[shard])
        pairs = zip(self._indexes[rows.start : rows.stop], self._duplicates[rows.start : rows.stop], strict=True)
        return [Photo(number, int(index), int(duplicate)) for index, duplicate in pairs]

    def keys(self, shard: int) -> list[str]:
        """Keys of the photos of a shard."""
        return [_key(self._sets, photo) for photo in self.of_shard(shard)]

    def items(self, shard: int) -> np.ndarray:
        """Items of the photos of a shard: uint64 [photos, 2], see `SetIndex.items`."""
        rows, index = self._rows(shard), self._sets[int(self._set_of[shard])].index
        samples, duplicates = self._indexes[rows.start : rows.stop], self._duplicates[rows.start : rows.stop]
        items = index.items[samples]
        items[duplicates >= 0] = index.duplicate_items[duplicates[duplicates >= 0]]
        return items

    def _rows(self, shard: int) -> range:
        return range(int(self._ends[shard - 1]) if shard else 0, int(self._ends[shard]))


def _key(sets: Sequence[ShardDataset], photo: Photo) -> str:
    index = sets[photo.data_set].index
    return index.keys[photo.sample] if photo.duplicate < 0 else index.duplicate_keys[photo.duplicate]


def _part_name(settings: Mapping[str, Any], shard: str, keys: Sequence[str]) -> str:
    """Name of a part of a store: a digest of the settings, the sha256 of its shard and the keys of its photos."""
    return hashlib.sha256(json.dumps([settings, shard, keys], sort_keys=True).encode()).hexdigest()[:_NAME_BYTES]


def _build(sets: Sequence[ShardDataset], settings: Mapping[str, Any], writer: ArrayWriter) -> None:
    """Adds the columns."""
    indexes, duplicates = writer.column("indexes", "<u4"), writer.column("duplicates", "<i4")
    ends, names = writer.column("ends", "<i8"), writer.column("names", "u1", _NAME_BYTES)
    for data, (first_samples, first_duplicates) in zip(sets, _first_photos(sets), strict=True):
        index, bounds = data.index, data.bounds
        rows = np.flatnonzero(first_duplicates)
        rows = rows[np.argsort(index.originals[rows], kind="stable")]
        originals = index.originals[rows]
        for number, shard in enumerate(data.manifest.shards):
            start, end = bounds[number : number + 2].tolist()
            low, high = np.searchsorted(originals, (start, end)).tolist()
            keys = index.keys[start:end]
            photos = [(start + row, keys[row], -1) for row in np.flatnonzero(first_samples[start:end]).tolist()]
            photos += [(int(index.originals[row]), index.duplicate_keys[row], row) for row in rows[low:high].tolist()]
            photos.sort()
            indexes.append(np.array([row for row, _, _ in photos]))
            duplicates.append(np.array([row for _, _, row in photos]))
            ends.append(np.array([len(indexes)]))
            names.append(_part_name(settings, shard.sha256, [key for _, key, _ in photos]).encode())


def _first_photos(sets: Sequence[ShardDataset]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each set, which samples and duplicates are the first photo of their item: bool [samples], [duplicates].

    Items are compared by ranges of their hashes, so that memory does not grow with the sets.
    """
    first = [(np.zeros(len(data), bool), np.zeros(len(data.index.duplicate_keys), bool)) for data in sets]
    columns = list(_columns(sets))
    total = sum(len(items) for _, items, _ in columns)
    bits = prefix_bits(total, _CHUNK)
    for prefix in range(1 << bits):
        parts = [with_prefix(items[:, 0], prefix, bits) for _, items, _ in columns]
        hashes = np.concatenate([items[rows] for (_, items, _), rows in zip(columns, parts, strict=True)])
        ranks = np.concatenate(
            [
                numbers[rows].astype("<u8") | np.uint64(number << 32)
                for (number, _, numbers), rows in zip(columns, parts, strict=True)
            ]
        )
        order = np.lexsort((ranks, hashes[:, 1], hashes[:, 0]))
        changes = np.ones(len(order), bool)
        changes[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
        is_first = np.zeros(len(order), bool)
        is_first[order[changes]] = True
        start = 0
        for column, rows in enumerate(parts):
            first[column // 2][column % 2][rows[is_first[start : start + len(rows)]]] = True
            start += len(rows)
    return first


def _columns(sets: Sequence[ShardDataset]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each set its number with the items and photo numbers of its samples, then of its duplicates."""
    for number, data in enumerate(sets):
        yield number, data.index.items, data.index.numbers
        yield number, data.index.duplicate_items, data.index.duplicate_numbers
