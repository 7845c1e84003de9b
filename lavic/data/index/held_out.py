"""Photos of a training set that also occur in a validation set, and the training set without them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lavic.storage.checksummed_json import digest_json
from lavic.storage.index.array_file import ArrayFile, ArrayWriter
from lavic.storage.index.shared import shared_index
from lavic.storage.index.text_hash import HashSet, hash_texts

if TYPE_CHECKING:
    from lavic.data.manifest import Manifest
    from lavic.data.shard_dataset import ShardDataset
    from lavic.data.tar_shards import Sample

KIND = "held_out/1"


def held_out(train: ShardDataset, valid: ShardDataset) -> HeldOut:
    """The samples of a training set that would leak into validation.

    That is every photo in `train` of an item that has a photo in `valid`, stored or as a duplicate, and every photo
    whose bytes, as received, are those of a photo in `valid`.
    """
    source = digest_json({"train": train.index.source, "valid": valid.index.source})
    owner = Path(f"{train.manifest.folder} without {valid.manifest.folder}")
    file = shared_index(lambda writer: _build(train, valid, writer), kind=KIND, source=source, owner=owner)
    return HeldOut.mapped(file)


class HeldOut:
    """Numbers of the samples to exclude from a set.

    They are stored as gaps: for each excluded sample, in ascending order, the number of remaining samples before it,
    int64 [n]. A file that they are mapped from is opened again after pickling.
    """

    def __init__(self, gaps: np.ndarray, file: ArrayFile | None = None) -> None:
        self._gaps, self._file = gaps, file

    @classmethod
    def mapped(cls, file: ArrayFile) -> HeldOut:
        """From a file of `held_out`."""
        return cls(file["gaps"], file)

    @classmethod
    def of(cls, rows: Sequence[int]) -> HeldOut:
        """From the numbers of samples, in ascending order."""
        return cls(_gaps(np.array(rows, dtype="<i8"), 0))

    def __len__(self) -> int:
        return len(self._gaps)

    def rows(self) -> np.ndarray:
        """The numbers of the excluded samples: int64 [n]"""
        return self._gaps + np.arange(len(self._gaps))

    def to_original(self, indices: np.ndarray) -> np.ndarray:
        """Indices among the remaining samples -> indices in the full set: int64 [n]"""
        return indices + np.searchsorted(self._gaps, indices, side="right")

    def from_original(self, indices: np.ndarray) -> np.ndarray:
        """Indices in the full set -> the number of remaining samples before each: int64 [n]"""
        return indices - np.searchsorted(self.rows(), indices)

    def __reduce__(self) -> tuple[Any, ...]:
        return (HeldOut.mapped, (self._file,)) if self._file else (HeldOut, (self._gaps,))


class FilteredDataset:
    """A set of shards without some of its samples; the others have new consecutive numbers."""

    def __init__(self, data: ShardDataset, excluded: HeldOut) -> None:
        self.data, self.excluded = data, excluded

    @property
    def manifest(self) -> Manifest:
        """The manifest of the full set."""
        return self.data.manifest

    def __len__(self) -> int:
        return len(self.data) - len(self.excluded)

    def __getitem__(self, index: int) -> Sample:
        return self.data[self._number(index)]

    @property
    def is_remote(self) -> bool:
        """As `ShardDataset.is_remote`."""
        return self.data.is_remote

    @property
    def bounds(self) -> np.ndarray:
        """As `ShardDataset.bounds`, for the remaining samples."""
        return self.excluded.from_original(self.data.bounds)

    def read_ahead(self, indices: np.ndarray) -> None:
        """As `ShardDataset.read_ahead`."""
        self.data.read_ahead(self.excluded.to_original(indices))

    def meta_and_text(self, index: int) -> tuple[dict[str, Any], str]:
        """As `ShardDataset.meta_and_text`."""
        return self.data.meta_and_text(self._number(index))

    def key(self, index: int) -> str:
        """As `ShardDataset.key`."""
        return self.data.key(self._number(index))

    def _number(self, index: int) -> int:
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(self.excluded.to_original(np.array([index]))[0])


def _build(train: ShardDataset, valid: ShardDataset, writer: ArrayWriter) -> None:
    """Adds the gaps."""
    index = train.index
    items = HashSet(np.concatenate([valid.index.items, valid.index.duplicate_items]))
    shards = range(len(valid.manifest.shards))
    # Half of a hash is enough: comparing 48 million photos with 10% of them excludes a wrong one once in 1e5 times.
    digests = np.unique(np.concatenate([_digests(valid, shard) for shard in shards]))
    originals = np.unique(index.originals[items.holds(index.duplicate_items)])
    gaps = writer.column("gaps", "<i8")
    for shard in range(len(train.manifest.shards)):
        start, end = train.bounds[shard : shard + 2]
        received = _digests(train, shard)
        excluded = digests[np.minimum(np.searchsorted(digests, received), len(digests) - 1)] == received
        excluded |= items.holds(index.items[start:end])
        low, high = np.searchsorted(originals, (start, end))
        excluded[originals[low:high] - start] = True
        gaps.append(_gaps(start + np.flatnonzero(excluded), len(gaps)))


def _gaps(rows: np.ndarray, excluded_before: int) -> np.ndarray:
    """The gaps of `HeldOut` for excluded rows."""
    return rows - excluded_before - np.arange(len(rows))


def _digests(data: ShardDataset, shard: int) -> np.ndarray:
    """The digests of one shard's photos, from its tar if the ledger has none: uint64 [samples]"""
    start, end = data.bounds[shard : shard + 2]
    digests = data.index.digests[start:end]
    return digests if digests.all() else hash_texts(data.digests_of(shard))[:, 0]
