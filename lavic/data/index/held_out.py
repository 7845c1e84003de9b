"""The photos of a training set that a validation set knows, and a training set without them."""

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
    """The samples that must not be trained on if a set is to validate: what it knows would be no news.

    Args:
        train: A set to train on.
        valid: A set to validate with.

    Returns:
        Of `train`, every photo of an item that `valid` holds a photo of, stored or referred to, and every photo whose
        bytes, as received, are those of one of `valid`'s, whatever item they are of.
    """
    source = digest_json({"train": train.index.source, "valid": valid.index.source})
    owner = Path(f"{train.manifest.folder} without {valid.manifest.folder}")
    file = shared_index(lambda writer: _build(train, valid, writer), kind=KIND, source=source, owner=owner)
    return HeldOut(file["gaps"], file)


class HeldOut:
    """Numbers of samples to leave out of a set."""

    def __init__(self, gaps: np.ndarray, file: ArrayFile | None = None) -> None:
        """Describes them.

        Args:
            gaps: For each sample that is left out, in ascending order, the samples before it that are not: int64 [n]
            file: Where they are mapped from; pickled, this is opened again.
        """
        self._gaps, self._file = gaps, file

    @classmethod
    def of(cls, rows: Sequence[int]) -> HeldOut:
        """A few samples, in ascending order."""
        return cls(_gaps(np.array(rows, dtype="<i8"), 0))

    def __len__(self) -> int:
        return len(self._gaps)

    def rows(self) -> np.ndarray:
        """The numbers of the samples: int64 [n]"""
        return self._gaps + np.arange(len(self._gaps))

    def kept(self, places: np.ndarray) -> np.ndarray:
        """The numbers of samples, from their places among those that are not left out: int64 [n]"""
        return places + np.searchsorted(self._gaps, places, side="right")

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """How many of the samples before some numbers are not left out: int64 [n]"""
        return numbers - np.searchsorted(self.rows(), numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self._file,)) if self._file else (HeldOut, (self._gaps,))


def _reopen(file: ArrayFile) -> HeldOut:
    return HeldOut(file["gaps"], file)


class Without:
    """A set of shards less some of its samples, under new consecutive numbers."""

    def __init__(self, data: ShardDataset, left_out: HeldOut) -> None:
        """Leave samples out.

        Args:
            data: The whole set.
            left_out: Which.
        """
        self.data, self.left_out = data, left_out

    @property
    def manifest(self) -> Manifest:
        """Of the whole set."""
        return self.data.manifest

    def __len__(self) -> int:
        return len(self.data) - len(self.left_out)

    def __getitem__(self, index: int) -> Sample:
        return self.data[self._number(index)]

    @property
    def is_remote(self) -> bool:
        """As `ShardDataset.is_remote`."""
        return self.data.is_remote

    @property
    def bounds(self) -> np.ndarray:
        """As `ShardDataset.bounds`, of the samples that are not left out."""
        return self.left_out.places(self.data.bounds)

    def read_ahead(self, indices: np.ndarray) -> None:
        """As `ShardDataset.read_ahead`."""
        self.data.read_ahead(self.left_out.kept(indices))

    def words(self, index: int) -> tuple[dict[str, Any], str]:
        """As `ShardDataset.words`."""
        return self.data.words(self._number(index))

    def _number(self, index: int) -> int:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(self.left_out.kept(np.array([place]))[0])


def _build(train: ShardDataset, valid: ShardDataset, writer: ArrayWriter) -> None:
    """Adds the gaps."""
    index = train.index
    items = HashSet(np.concatenate([valid.index.items, valid.index.duplicate_items]))
    shards = range(len(valid.manifest.shards))
    # one half of a hash: once in 1e5 comparisons of 48 million photos with a tenth of them a photo too many is left out
    digests = np.unique(np.concatenate([_digests(valid, shard) for shard in shards]))
    originals = np.unique(index.originals[items.holds(index.duplicate_items)])
    gaps = writer.column("gaps", "<i8")
    for shard in range(len(train.manifest.shards)):
        start, end = train.bounds[shard : shard + 2]
        received = _digests(train, shard)
        known = digests[np.minimum(np.searchsorted(digests, received), len(digests) - 1)] == received
        known |= items.holds(index.items[start:end])
        low, high = np.searchsorted(originals, (start, end))
        known[originals[low:high] - start] = True
        gaps.append(_gaps(start + np.flatnonzero(known), len(gaps)))


def _gaps(rows: np.ndarray, before: int) -> np.ndarray:
    """See `HeldOut.__init__`; so many samples are left out before these rows."""
    return rows - before - np.arange(len(rows))


def _digests(data: ShardDataset, shard: int) -> np.ndarray:
    """The digests of one shard's photos, from its tar where no ledger says them: uint64 [samples]"""
    start, end = data.bounds[shard : shard + 2]
    digests = data.index.digests[start:end]
    return digests if digests.all() else hash_texts(data.digests_of(shard))[:, 0]
