"""Random access to the samples of a set of shards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from lavic.data.index.set_index import Duplicates, SetIndex
from lavic.data.index.sidecar import Sidecar
from lavic.data.ledger import read_digests
from lavic.data.manifest import Manifest
from lavic.data.remote_shards import CacheSettings, RemoteShards
from lavic.data.tar_shards import BLOCK, Sample, member_bytes, parse_metadata, parse_sample, read_offsets
from lavic.errors import DataError
from lavic.storage.cache.open_files import FILES, OpenFiles
from lavic.storage.index.text_column import TextColumn
from lavic.storage.paths import as_path, is_remote

T = TypeVar("T")
Descriptions: TypeAlias = Literal["sidecar", "shard"] | None
_CACHED_SHARDS = 64
"""Shards whose offsets (8 bytes a sample) and sidecars are cached."""


class ShardDataset:
    """A set of shards as a sequence of samples.

    Samples are numbered through the shards in the manifest's order. A read is one `pread` at an offset. Memory does not
    grow with the set: the metadata of all samples is memory-mapped, see `SetIndex`. It may be passed to DataLoader
    workers: it is pickled as its folder, and each process opens its own files.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        descriptions: Descriptions = "sidecar",
        cache: CacheSettings | None = None,
        copy: bool = True,
    ) -> None:
        """Opens a set.

        Args:
            folder: The folder of `manifest.json`: a path, or a URI such as s3://bucket/prefix, whose shards are copied
                to the local disk when they are first read; see `lavic.storage.cache.shard_cache`.
            descriptions: The source of `Sample.text`: "sidecar" is the teacher's description, or else the shard's txt
                member; "shard" is the txt member; None leaves it empty. A txt member with the item's title (`lavic
                crawl --text title`) is no description and counts as empty.
            cache: Of the shards in an object store; None: the defaults.
            copy: Whether a shard in an object store is copied before it is read. False downloads single samples, unless
                there is a copy already: for access to few samples.

        Raises:
            DataError: The set is empty or incomplete, or does not match its manifest.
        """
        self._open(Manifest.load(folder), descriptions, cache or CacheSettings(), copy)

    def _open(self, manifest: Manifest, descriptions: Descriptions, cache: CacheSettings, copy: bool) -> None:
        self.manifest, self.descriptions = manifest, descriptions
        if not self.manifest.shards:
            raise DataError(f"{manifest.folder}: the set has no photos")
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
        location = f"{self._path(shard)} sample {row}"
        sample = parse_sample(self._read(shard, int(offsets[row]), int(offsets[row + 1])), location)
        text = self._text(shard, row, sample.meta, sample.text)
        if text == sample.text:
            return sample
        return Sample(key=sample.key, item_id=sample.item_id, jpg=sample.jpg, meta=sample.meta, text=text)

    def meta_and_text(self, index: int) -> tuple[dict[str, Any], str]:
        """The json member of a sample and its description, without reading the photo."""
        shard, row = self._find(index)
        offsets = self._index(shard)
        start, end = int(offsets[row]), int(offsets[row + 1])
        location = f"{self._path(shard)} sample {row}"
        start += member_bytes(self._read(shard, start, start + BLOCK), location)
        meta, text = parse_metadata(self._read(shard, start, end), location)
        return meta, self._text(shard, row, meta, text)

    @property
    def is_remote(self) -> bool:
        """Whether the set is in an object store; only then has `read_ahead` an effect."""
        return self._remote is not None

    def read_ahead(self, indices: np.ndarray) -> None:
        """Downloads the shards of the samples that are read next (int64 [n], in their order), in the background."""
        if self._remote is not None:
            shards = np.searchsorted(self._starts, indices, side="right") - 1
            self._remote.read_ahead(dict.fromkeys(shards.tolist()))

    @cached_property
    def index(self) -> SetIndex:
        """The metadata of all samples; built if this node has not built it yet."""
        return SetIndex.of(self)

    @property
    def keys(self) -> TextColumn:
        """The key of every sample, in order."""
        return self.index.keys

    def key(self, index: int) -> str:
        """The key of a sample, without reading its shard."""
        return self.keys[index]

    @property
    def references(self) -> Duplicates:
        """Photos with the bytes of a sample that are not stored themselves, by key."""
        return Duplicates(self.index)

    @property
    def bounds(self) -> np.ndarray:
        """Number of the first sample of each shard, then the number of all samples: int64 [shards + 1]."""
        return self._starts

    def keys_of(self, number: int) -> list[str]:
        """The keys of one shard's samples, in order, from its ledger; from its tar if the ledger cannot be used."""
        return self.ledger_of(number)[0]

    def ledger_of(self, number: int) -> tuple[list[str], list[str]]:
        """`keys_of`, and the sha256 of each photo as received; no digests if the ledger has none."""
        if rows := self._ledger(number):
            keys, digests = map(list, zip(*rows, strict=True))
            return keys, digests if all(digests) else []
        return [self._key(number, int(start)) for start in self._index(number)[:-1]], []

    def digests_of(self, number: int) -> list[str]:
        """The sha256 of each of one shard's photos as received, in order: from its ledger, or its tar."""
        if digests := self.ledger_of(number)[1]:
            return digests
        first = int(self._starts[number])
        metas = (self.meta_and_text(first + row)[0] for row in range(self.manifest.shards[number].samples))
        return [meta["source_sha256"] for meta in metas]

    def _ledger(self, number: int) -> list[tuple[str, str]] | None:
        """Keys and digests from a shard's ledger; None if it cannot be used."""
        path = self._path(number)
        rows = read_digests(path, self.manifest.shards[number].samples)
        # The first key detects another shard's ledger; a remote tar is not downloaded for that.
        return rows if rows and (is_remote(path) or self._key(number, 0) == rows[0][0]) else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.manifest.folder), self.manifest.digest, self.descriptions, self._cache, self._copy)

    def _path(self, shard: int) -> Path:
        """The path of a shard's tar."""
        path = self.manifest.path(self.manifest.shards[shard])
        # The client of a store does not survive a fork: each process makes a new one.
        return path if self._remote is None else as_path(str(path))

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
        return _cached(self._offsets, shard, lambda: read_offsets(self._path(shard), entry.samples, entry.bytes))

    def _text(self, shard: int, row: int, meta: dict[str, Any], text: str) -> str:
        """The description of a sample whose txt member is `text`."""
        if self.descriptions is None:
            return ""
        if text == meta["title"]:
            text = ""
        if self.descriptions == "shard":
            return text
        sidecar = _cached(self._sidecars, shard, lambda: Sidecar(self._path(shard), self._owner))
        return sidecar.text(row, meta, text)

    def _read(self, shard: int, start: int, end: int) -> bytes:
        if self._remote is not None:
            return self._remote.read(shard, start, end)
        return FILES.get((self._owner, shard), lambda: self._path(shard)).read(start, end)

    # At interpreter exit, the names of modules may be None before this is called.
    def __del__(self, files: OpenFiles = FILES) -> None:
        if owner := getattr(self, "_owner", None):
            files.drop(owner)


def _cached(cache: OrderedDict[int, T], shard: int, make: Callable[[], T]) -> T:
    """A value from the LRU cache of the shards that were read last."""
    value = cache.pop(shard, None)
    cache[shard] = value = make() if value is None else value
    while len(cache) > _CACHED_SHARDS:
        cache.popitem(last=False)
    return value


def _reopen(folder: str, digest: str, descriptions: Descriptions, cache: CacheSettings, copy: bool) -> ShardDataset:
    """Opens a set in another process, without the checks of the first time."""
    manifest = Manifest.load(folder, check=False)
    if manifest.digest != digest:
        raise DataError(f"{folder}: the set changed while in use; run the command again")
    data = ShardDataset.__new__(ShardDataset)
    data._open(manifest, descriptions, cache, copy)
    return data
