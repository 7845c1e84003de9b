"""Reading a set of shards by index, in an order that a seed and one integer describe."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lavic.data.descriptions import read_descriptions
from lavic.data.duplicates import Reference, read_all_references
from lavic.data.ledger import read_digests
from lavic.data.manifest import Manifest
from lavic.data.tar_shards import BLOCK, Sample, member_bytes, parse_sample, parse_words, read_offsets
from lavic.errors import DataError
from lavic.storage.paths import is_remote
from lavic.storage.shard_cache import local_copy

_OPEN_FILES = 64


class ShardDataset:
    """A set of shards as a sequence of samples.

    Samples are numbered through the shards in the manifest's order. Reading is by offset, so any sample costs one
    `pread`. Safe to hand to DataLoader workers: forked or pickled, every process opens its own files.
    """

    def __init__(self, folder: str | Path, *, descriptions: Literal["sidecar", "shard"] | None = "sidecar") -> None:
        """Open a set.

        Args:
            folder: Where `manifest.json` stands: a path, or an address such as s3://bucket/prefix, whose shards are
                copied here when they are first read; see `lavic.storage.shard_cache`.
            descriptions: Where `Sample.text` comes from: "sidecar" takes the teacher's description where there is one
                and else the shard's txt member, "shard" the txt member alone, None leaves it empty. A txt member that
                holds the item's title (`lavic crawl --text title`) describes nothing and counts as empty.

        Raises:
            DataError: The set is empty, not whole, or not what its manifest says.
        """
        self.manifest = Manifest.load(folder)
        self.descriptions = descriptions
        if not self.manifest.shards:
            raise DataError(f"{folder}: a set without a single photo")
        self._paths = [self.manifest.path(shard) for shard in self.manifest.shards]
        self._starts = np.cumsum([0, *(shard.samples for shard in self.manifest.shards)])
        self._offsets: dict[int, np.ndarray] = {}
        self._texts: dict[int, dict[str, str]] = {}
        self._files: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        shard, row = self._find(index)
        offsets = self._index(shard)
        place = f"{self._paths[shard]} sample {row}"
        sample = parse_sample(self._read(shard, int(offsets[row]), int(offsets[row + 1])), place)
        text = self._text(shard, sample.meta, sample.text)
        if text == sample.text:
            return sample
        return Sample(key=sample.key, item_id=sample.item_id, jpg=sample.jpg, meta=sample.meta, text=text)

    def words(self, index: int) -> tuple[dict[str, Any], str]:
        """The json member of a sample and its description, without reading the photo."""
        shard, row = self._find(index)
        offsets = self._index(shard)
        start, end = int(offsets[row]), int(offsets[row + 1])
        place = f"{self._paths[shard]} sample {row}"
        start += member_bytes(self._read(shard, start, start + BLOCK), place)
        meta, text = parse_words(self._read(shard, start, end), place)
        return meta, self._text(shard, meta, text)

    @cached_property
    def keys(self) -> list[str]:
        """The key of every sample, in order; read once."""
        return [key for number in range(len(self._paths)) for key in self.keys_of(number)]

    def keys_of(self, number: int) -> list[str]:
        """The keys of one shard's samples, in order: from its ledger, or where that is of no use from its tar."""
        if rows := self._ledger(number):
            return [key for key, _ in rows]
        return [self._key(number, int(start)) for start in self._index(number)[:-1]]

    def digests_of(self, number: int) -> list[str]:
        """The sha256 of each of one shard's photos as it was received, in order: from its ledger, or its tar."""
        rows = self._ledger(number)
        if rows and all(digest for _, digest in rows):
            return [digest for _, digest in rows]
        first = int(self._starts[number])
        metas = (self.words(first + row)[0] for row in range(self.manifest.shards[number].samples))
        return [meta["source_sha256"] for meta in metas]

    def _ledger(self, number: int) -> list[tuple[str, str]] | None:
        """Keys and digests by a shard's ledger; None where that is of no use."""
        path = self._paths[number]
        rows = read_digests(path, self.manifest.shards[number].samples)
        # a glance at the tar tells another shard's ledger; one that lies elsewhere is not fetched for it
        return rows if rows and (is_remote(path) or self._key(number, 0) == rows[0][0]) else None

    @cached_property
    def references(self) -> dict[str, Reference]:
        """Photos that share the bytes of a sample and are not samples themselves, by key."""
        found = read_all_references(self.manifest.folder) if self.manifest.references else ()
        return {one.key: one for one in found}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def _key(self, shard: int, start: int) -> str:
        return self._read(shard, start, start + 100).partition(b".")[0].decode("utf-8", "replace")

    def _find(self, index: int) -> tuple[int, int]:
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _index(self, shard: int) -> np.ndarray:
        if shard not in self._offsets:
            entry = self.manifest.shards[shard]
            self._offsets[shard] = read_offsets(self._paths[shard], entry.samples, entry.bytes)
        return self._offsets[shard]

    def _text(self, shard: int, meta: dict[str, Any], text: str) -> str:
        """The description of a sample with this txt member."""
        if self.descriptions is None:
            return ""
        if text == meta["title"]:
            text = ""
        return self._sidecar(shard).get(meta["key"], text) if self.descriptions == "sidecar" else text

    def _sidecar(self, shard: int) -> dict[str, str]:
        if shard not in self._texts:
            self._texts[shard] = read_descriptions(self._paths[shard])
        return self._texts[shard]

    def _read(self, shard: int, start: int, end: int) -> bytes:
        if self._process != os.getpid():
            # A forked worker leaves its parent's descriptors alone.
            self._process, self._files = os.getpid(), OrderedDict()
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            entry = self.manifest.shards[shard]
            self._files[shard] = os.open(local_copy(self._paths[shard], entry.sha256, entry.bytes), os.O_RDONLY)
        self._files.move_to_end(shard)
        return os.pread(self._files[shard], end - start, start)

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():
            for file in self._files.values():
                os.close(file)


def held_out(train: ShardDataset, valid: ShardDataset) -> set[str]:
    """Keys of the samples that must not be trained on if a set is to validate: what it knows would be no news.

    Args:
        train: A set to train on.
        valid: A set to validate with.

    Returns:
        Of `train`, every photo of an item that `valid` holds a photo of, stored or referred to, and every photo whose
        bytes, as received, are those of one of `valid`'s, whatever item they are of.
    """
    items = {_item(key) for key in (*valid.keys, *valid.references)}
    digests = {digest for number in range(len(valid.manifest.shards)) for digest in valid.digests_of(number)}
    found = {reference.same_as for reference in train.references.values() if _item(reference.key) in items}
    for number in range(len(train.manifest.shards)):
        pairs = zip(train.keys_of(number), train.digests_of(number), strict=True)
        found.update(key for key, digest in pairs if _item(key) in items or digest in digests)
    return found


def _item(key: str) -> str:
    return key.rpartition("_")[0]


class Without:
    """A set of shards less some of its samples, under new consecutive numbers."""

    def __init__(self, data: ShardDataset, keys: Iterable[str]) -> None:
        """Leave samples out.

        Args:
            data: The whole set.
            keys: Of the samples to leave out; those that the set does not hold do not matter.
        """
        unwanted = frozenset(keys)
        self.data = data
        self._kept = np.flatnonzero([key not in unwanted for key in data.keys]) if unwanted else np.arange(len(data))

    @property
    def manifest(self) -> Manifest:
        """Of the whole set."""
        return self.data.manifest

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        return self.data[int(self._kept[index])]

    def words(self, index: int) -> tuple[dict[str, Any], str]:
        """As `ShardDataset.words`."""
        return self.data.words(int(self._kept[index]))


class Order:
    """The order in which samples are seen: a pure function of (n, seed, block), with nothing to save but a position.

    Position p is sample p % n of epoch p // n. In every epoch the blocks of `block` neighbouring samples are shuffled,
    then the samples within each window of `mix` blocks: random enough to train on, local enough to read from a disk.
    A window's order is made when it is reached, so the start is instant at any position of any size of set.
    """

    def __init__(self, n: int, seed: int = 0, block: int = 256, mix: int = 16) -> None:
        """Describe an order of `n` samples.

        Args:
            n: Samples per epoch, at least 1.
            seed: Another seed, another order.
            block: Neighbouring samples that stay in one window.
            mix: Blocks shuffled together.
        """
        if n < 1 or block < 1 or mix < 1:
            raise ValueError(f"n, block and mix are at least 1, got {n}, {block} and {mix}")
        self.n, self.seed, self.block, self.mix = n, seed, block, mix
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._window: tuple[int, int, np.ndarray] | None = None

    def at(self, position: int) -> int:
        """Index of the sample at a global position, counted from 0 over all epochs."""
        epoch, place = divmod(position, self.n)
        blocks, starts = self._blocks(epoch)
        window = int(np.searchsorted(starts, place, side="right")) - 1
        return int(self._indices(epoch, window, blocks)[place - int(starts[window])])

    def epoch(self, epoch: int) -> np.ndarray:
        """One whole epoch: int64 [n], a permutation."""
        blocks, starts = self._blocks(epoch)
        return np.concatenate([self._indices(epoch, window, blocks) for window in range(len(starts) - 1)])

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffled block numbers, and the place at which each window of them starts (with the end)."""
        if self._epoch is None or self._epoch[0] != epoch:
            blocks = self._random(epoch).permutation(-(-self.n // self.block))
            sizes = np.minimum(self.block, self.n - blocks * self.block)
            ends = np.cumsum([0, *np.add.reduceat(sizes, np.arange(0, len(sizes), self.mix))])
            self._epoch = (epoch, blocks, ends)
        return self._epoch[1], self._epoch[2]

    def _indices(self, epoch: int, window: int, blocks: np.ndarray) -> np.ndarray:
        if self._window is None or self._window[:2] != (epoch, window):
            starts = blocks[window * self.mix : (window + 1) * self.mix] * self.block
            indices = np.concatenate([np.arange(start, min(start + self.block, self.n)) for start in starts])
            self._random(epoch, window + 1).shuffle(indices)
            self._window = (epoch, window, indices)
        return self._window[2]

    def _random(self, *stream: int) -> np.random.RandomState:
        # RandomState, because numpy promises its streams for ever: a resumed run must see the order it began with.
        return np.random.RandomState([self.seed & 0xFFFFFFFF, *stream])


def order(n: int, seed: int, epoch: int, block: int = 256) -> np.ndarray:
    """The permutation of one epoch, int64 [n]; see `Order`."""
    return Order(n, seed, block).epoch(epoch)
