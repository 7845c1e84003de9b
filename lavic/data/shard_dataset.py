"""Reading a set of shards by index, in an order that a seed and one integer describe."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from lavic.data.index.set_index import Duplicates, SetIndex
from lavic.data.index.sidecar import Sidecar
from lavic.data.ledger import read_digests
from lavic.data.manifest import Manifest
from lavic.data.remote_shards import CacheSettings, RemoteShards
from lavic.data.tar_shards import BLOCK, Sample, member_bytes, parse_sample, parse_words, read_offsets
from lavic.errors import DataError
from lavic.storage.cache.open_files import FILES, OpenFiles
from lavic.storage.index.text_column import TextColumn
from lavic.storage.paths import is_remote, place

T = TypeVar("T")
_SHARDS = 64
"""Shards whose offsets are kept, in bytes of memory eight times as many as they hold samples."""


class ShardDataset:
    """A set of shards as a sequence of samples.

    Samples are numbered through the shards in the manifest's order. Reading is by offset, so any sample costs one
    `pread`. Memory does not grow with the set: what is known of every sample is mapped, see `SetIndex`. Safe to hand to
    DataLoader workers: pickled it is its folder, and each process opens its own files.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        descriptions: Literal["sidecar", "shard"] | None = "sidecar",
        cache: CacheSettings | None = None,
        copy: bool = True,
    ) -> None:
        """Open a set.

        Args:
            folder: Where `manifest.json` stands: a path, or an address such as s3://bucket/prefix, whose shards are
                copied here when they are first read; see `lavic.storage.cache.shard_cache`.
            descriptions: Where `Sample.text` comes from: "sidecar" takes the teacher's description where there is one
                and else the shard's txt member, "shard" the txt member alone, None leaves it empty. A txt member that
                holds the item's title (`lavic crawl --text title`) describes nothing and counts as empty.
            cache: Where the copies of a set in an object store are, and how many; None: the defaults.
            copy: Whether a shard of an object store is copied here before it is read. False downloads single samples,
                for few of them here and there; a copy that is here already is used.

        Raises:
            DataError: The set is empty, not whole, or not what its manifest says.
        """
        self._open(Manifest.load(folder), descriptions, cache or CacheSettings(), copy)

    def _open(
        self, manifest: Manifest, descriptions: Literal["sidecar", "shard"] | None, cache: CacheSettings, copy: bool
    ) -> None:
        self.manifest, self.descriptions = manifest, descriptions
        if not self.manifest.shards:
            raise DataError(f"{manifest.folder}: a set without a single photo")
        self._cache, self._copy = cache, copy
        self._remote = RemoteShards(manifest, cache, copy=copy) if is_remote(manifest.folder) else None
        self._starts = np.cumsum([0, *(shard.samples for shard in self.manifest.shards)])
        self._offsets: OrderedDict[int, np.ndarray] = OrderedDict()
        self._sidecars: OrderedDict[int, Sidecar] = OrderedDict()
        self._owner = object()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        shard, row = self._find(index)
        offsets = self._index(shard)
        place = f"{self._path(shard)} sample {row}"
        sample = parse_sample(self._read(shard, int(offsets[row]), int(offsets[row + 1])), place)
        text = self._text(shard, row, sample.meta, sample.text)
        if text == sample.text:
            return sample
        return Sample(key=sample.key, item_id=sample.item_id, jpg=sample.jpg, meta=sample.meta, text=text)

    def words(self, index: int) -> tuple[dict[str, Any], str]:
        """The json member of a sample and its description, without reading the photo."""
        shard, row = self._find(index)
        offsets = self._index(shard)
        start, end = int(offsets[row]), int(offsets[row + 1])
        place = f"{self._path(shard)} sample {row}"
        start += member_bytes(self._read(shard, start, start + BLOCK), place)
        meta, text = parse_words(self._read(shard, start, end), place)
        return meta, self._text(shard, row, meta, text)

    @property
    def is_remote(self) -> bool:
        """Whether its shards are downloaded before they are read: `read_ahead` does something then."""
        return self._remote is not None

    def read_ahead(self, indices: np.ndarray) -> None:
        """Download the shards of the samples that are read next, in this order, in the background.

        Args:
            indices: int64 [n], numbers of samples, those needed first at the beginning.
        """
        if self._remote is not None:
            shards = np.searchsorted(self._starts, indices, side="right") - 1
            self._remote.read_ahead(dict.fromkeys(shards.tolist()))

    @cached_property
    def index(self) -> SetIndex:
        """What is known of every sample; made where nobody on this node has made it."""
        return SetIndex.of(self)

    @property
    def keys(self) -> TextColumn:
        """The key of every sample, in order."""
        return self.index.keys

    @property
    def references(self) -> Duplicates:
        """Photos that share the bytes of a sample and are not samples themselves, by key."""
        return Duplicates(self.index)

    @property
    def bounds(self) -> np.ndarray:
        """Number of the first sample of each shard, and at the end of all samples: int64 [shards + 1]."""
        return self._starts

    def keys_of(self, number: int) -> list[str]:
        """The keys of one shard's samples, in order: from its ledger, or where that is of no use from its tar."""
        return self.ledger_of(number)[0]

    def ledger_of(self, number: int) -> tuple[list[str], list[str]]:
        """As `keys_of`; and the sha256 of each photo as it was received, or none where the ledger does not say it."""
        if rows := self._ledger(number):
            keys, digests = map(list, zip(*rows, strict=True))
            return keys, digests if all(digests) else []
        return [self._key(number, int(start)) for start in self._index(number)[:-1]], []

    def digests_of(self, number: int) -> list[str]:
        """The sha256 of each of one shard's photos as it was received, in order: from its ledger, or its tar."""
        if digests := self.ledger_of(number)[1]:
            return digests
        first = int(self._starts[number])
        metas = (self.words(first + row)[0] for row in range(self.manifest.shards[number].samples))
        return [meta["source_sha256"] for meta in metas]

    def _ledger(self, number: int) -> list[tuple[str, str]] | None:
        """Keys and digests by a shard's ledger; None where that is of no use."""
        path = self._path(number)
        rows = read_digests(path, self.manifest.shards[number].samples)
        # a glance at the tar tells another shard's ledger; one that lies elsewhere is not fetched for it
        return rows if rows and (is_remote(path) or self._key(number, 0) == rows[0][0]) else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.manifest.folder), self.manifest.digest, self.descriptions, self._cache, self._copy)

    def _path(self, shard: int) -> Path:
        """Where a shard's tar stands, for reading what is beside it."""
        path = self.manifest.path(self.manifest.shards[shard])
        # a store's client does not survive a fork: each process makes its own
        return path if self._remote is None else place(str(path))

    def _key(self, shard: int, start: int) -> str:
        return self._read(shard, start, start + 100).partition(b".")[0].decode("utf-8", "replace")

    def _find(self, index: int) -> tuple[int, int]:
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _index(self, shard: int) -> np.ndarray:
        entry = self.manifest.shards[shard]
        return _kept(self._offsets, shard, lambda: read_offsets(self._path(shard), entry.samples, entry.bytes))

    def _text(self, shard: int, row: int, meta: dict[str, Any], text: str) -> str:
        """The description of a sample with this txt member."""
        if self.descriptions is None:
            return ""
        if text == meta["title"]:
            text = ""
        if self.descriptions == "shard":
            return text
        sidecar = _kept(self._sidecars, shard, lambda: Sidecar(self._path(shard), self._owner))
        return sidecar.text(row, meta["key"], text)

    def _read(self, shard: int, start: int, end: int) -> bytes:
        if self._remote is not None:
            return self._remote.read(shard, start, end)
        return FILES.get((self._owner, shard), lambda: self._path(shard)).read(start, end)

    # when the interpreter ends, modules may be gone before this is called
    def __del__(self, files: OpenFiles = FILES) -> None:
        if owner := getattr(self, "_owner", None):
            files.drop(owner)


def _kept(cache: OrderedDict[int, T], shard: int, make: Callable[[], T]) -> T:
    """What is kept of the shards that were read last."""
    value = cache.pop(shard, None)
    cache[shard] = value = make() if value is None else value
    while len(cache) > _SHARDS:
        cache.popitem(last=False)
    return value


def _reopen(
    folder: str, digest: str, descriptions: Literal["sidecar", "shard"] | None, cache: CacheSettings, copy: bool
) -> ShardDataset:
    """A set in another process; what was checked when it was opened first is not checked again."""
    manifest = Manifest.load(folder, check=False)
    if manifest.digest != digest:
        raise DataError(f"{folder}: the set was changed while it was in use; run the command again")
    data = ShardDataset.__new__(ShardDataset)
    data._open(manifest, descriptions, cache, copy)
    return data


class Order:
    """The order in which samples are seen: a pure function of (n, seed, block), with nothing to save but a position.

    Position p is sample p % n of epoch p // n. In every epoch the blocks of `block` neighbouring samples are shuffled,
    then the samples within each window of `mix` blocks: random enough to train on, local enough to read from a disk.
    A window's order is made when it is reached, so the start is instant at any position of any size of set.
    """

    def __init__(
        self, n: int, seed: int = 0, block: int = 256, mix: int = 16, bounds: Sequence[int] | np.ndarray | None = None
    ) -> None:
        """Describe an order of `n` samples.

        Args:
            n: Samples per epoch, at least 1.
            seed: Another seed, another order.
            block: Neighbouring samples that stay in one window.
            mix: Blocks shuffled together.
            bounds: In the place of `block`: where each block starts, from 0, and where the last one ends.
        """
        if n < 1 or block < 1 or mix < 1:
            raise ValueError(f"n, block and mix are at least 1, got {n}, {block} and {mix}")
        if bounds is not None and (bounds[0] != 0 or bounds[-1] != n):
            raise ValueError(f"blocks of {n} samples go from 0 to {n}, not from {bounds[0]} to {bounds[-1]}")
        self.n, self.seed, self.block, self.mix = n, seed, block, mix
        self._bounds = None if bounds is None else np.unique(bounds)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._window: tuple[int, int, np.ndarray] | None = None

    @property
    def window(self) -> int:
        """Samples that are shuffled together, about."""
        if self._bounds is None:
            return min(self.n, self.block * self.mix)
        return -(-self.n * self.mix // (len(self._bounds) - 1))

    def at(self, position: int) -> int:
        """Index of the sample at a global position, counted from 0 over all epochs."""
        epoch, place = divmod(position, self.n)
        blocks, starts = self._blocks(epoch)
        window = int(np.searchsorted(starts, place, side="right")) - 1
        return int(self._indices(epoch, window, blocks)[place - int(starts[window])])

    def span(self, first: int, last: int) -> np.ndarray:
        """Indices at the positions from `first` up to, but not with, `last`: int64 [last - first]."""
        parts = [np.empty(0, np.int64)]
        while first < last:
            epoch, place = divmod(first, self.n)
            blocks, starts = self._blocks(epoch)
            window = int(np.searchsorted(starts, place, side="right")) - 1
            start = int(starts[window])
            parts.append(self._indices(epoch, window, blocks)[place - start : place - start + last - first])
            first += len(parts[-1])
        return np.concatenate(parts)

    def epoch(self, epoch: int) -> np.ndarray:
        """One whole epoch: int64 [n], a permutation."""
        blocks, starts = self._blocks(epoch)
        return np.concatenate([self._indices(epoch, window, blocks) for window in range(len(starts) - 1)])

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffled block numbers, and the place at which each window of them starts (with the end)."""
        if self._epoch is None or self._epoch[0] != epoch:
            count = -(-self.n // self.block) if self._bounds is None else len(self._bounds) - 1
            blocks = self._random(epoch).permutation(count)
            sizes = self._ends(blocks) - self._starts(blocks)
            ends = np.cumsum([0, *np.add.reduceat(sizes, np.arange(0, len(sizes), self.mix))])
            self._epoch = (epoch, blocks, ends)
        return self._epoch[1], self._epoch[2]

    def _indices(self, epoch: int, window: int, blocks: np.ndarray) -> np.ndarray:
        if self._window is None or self._window[:2] != (epoch, window):
            mixed = blocks[window * self.mix : (window + 1) * self.mix]
            bounds = zip(self._starts(mixed).tolist(), self._ends(mixed).tolist(), strict=True)
            indices = np.concatenate([np.arange(start, end) for start, end in bounds])
            self._random(epoch, window + 1).shuffle(indices)
            self._window = (epoch, window, indices)
        return self._window[2]

    def _starts(self, blocks: np.ndarray) -> np.ndarray:
        return blocks * self.block if self._bounds is None else self._bounds[blocks]

    def _ends(self, blocks: np.ndarray) -> np.ndarray:
        return np.minimum((blocks + 1) * self.block, self.n) if self._bounds is None else self._bounds[blocks + 1]

    def _random(self, *stream: int) -> np.random.RandomState:
        # RandomState, because numpy promises its streams for ever: a resumed run must see the order it began with.
        return np.random.RandomState([self.seed & 0xFFFFFFFF, *stream])


def order(n: int, seed: int, epoch: int, block: int = 256) -> np.ndarray:
    """The permutation of one epoch, int64 [n]; see `Order`."""
    return Order(n, seed, block).epoch(epoch)
