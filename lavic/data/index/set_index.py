"""The index of a set of shards: key, item and digest of every photo, and the duplicates.

It is built once per node from the shards' ledgers, or from the tars if a ledger cannot be used. A photo takes about 46
bytes, of which the 12 of its key are read on demand; a duplicate takes 50.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lavic.data.duplicates import ENDING, Reference, parse_references
from lavic.errors import DataError, first_line
from lavic.storage.checksummed_json import digest_json
from lavic.storage.index.array_file import ArrayFile, ArrayWriter, GrowingColumn
from lavic.storage.index.shared import shared_index
from lavic.storage.index.text_column import TextColumn, TextColumnWriter
from lavic.storage.index.text_hash import hash_text, hash_texts, in_order
from lavic.storage.paths import as_path, file_sizes, storage_errors

if TYPE_CHECKING:
    from lavic.data.shard_dataset import ShardDataset

KIND = "set/2"
_NAME_BYTES = 128
_MAX_NUMBER = 2**32 - 1


class SetIndex:
    """Metadata of every photo of a set, without reading its shards. All arrays are memory-mapped.

    Attributes:
        source: Digest of the set.
        keys: The key of each sample, in order.
        items: Hash of each sample's item id, as in its key: uint64 [samples, 2], see `hash_texts`.
        numbers: Number of each photo within its item: uint32 [samples]
        digests: First half of the hash of its sha256 as received: uint64 [samples]; 0 if no ledger has it.
        duplicate_keys: The key of each duplicate, in the order of their files and lines.
        duplicate_items: `items` of the duplicates.
        duplicate_numbers: `numbers` of the duplicates.
        originals: The sample with the bytes of each duplicate: uint32 [duplicates]
    """

    def __init__(self, folder: Path, file: ArrayFile) -> None:
        self._folder, self._file = folder, file
        self.source = file.metadata["source"]
        self.keys, self.duplicate_keys = TextColumn(file, "keys"), TextColumn(file, "duplicate_keys")
        self.items, self.numbers, self.digests = file["items"], file["numbers"], file["digests"]
        self.duplicate_items, self.duplicate_numbers = file["duplicate_items"], file["duplicate_numbers"]
        self.originals = file["originals"]
        self._order, self._duplicate_order = file["order"], file["duplicate_order"]

    @classmethod
    def of(cls, data: ShardDataset) -> SetIndex:
        """Opens the index of a set; builds it if it is missing. Raises DataError where the set is broken."""
        folder = data.manifest.folder
        sizes = file_sizes(folder) if data.manifest.references else {}
        files = {name: size for name, size in sizes.items() if name.endswith(f".{ENDING}")}
        source = digest_json({"manifest": data.manifest.digest, "duplicates": files})
        names = sorted(files)
        file = shared_index(lambda writer: _build(data, names, writer), kind=KIND, source=source, owner=folder)
        return cls(folder, file)

    def find(self, key: str) -> int | None:
        """The number of the sample with a key, or None."""
        return _find(key, self.keys, self.items, self._order)

    def find_duplicate(self, key: str) -> int | None:
        """The number of the duplicate with a key, from 0, or None."""
        return _find(key, self.duplicate_keys, self.duplicate_items, self._duplicate_order)

    def find_stored(self, key: str) -> int | None:
        """The number of the sample with the bytes of a photo, which may be a duplicate, or None."""
        if (row := self.find(key)) is None and (duplicate := self.find_duplicate(key)) is not None:
            row = int(self.originals[duplicate])
        return row

    def duplicate(self, row: int) -> Reference:
        """Reads a duplicate from its file. Raises DataError where that has changed since the index was built."""
        name = bytes(self._file["files"][int(self._file["duplicate_files"][row])]).rstrip(b"\0").decode()
        start, end = map(int, self._file["lines"][row])
        path = as_path(str(self._folder / name))  # the client of a store does not survive a fork
        try:
            with path.open("rb") as file:
                file.seek(start)
                (reference,) = parse_references(file.read(end - start), path)
        except storage_errors(ValueError) as error:
            raise DataError(f"{path}: cannot be read ({first_line(error)})") from None
        if reference.key != self.duplicate_keys[row]:
            raise DataError(f"{path}: changed while in use; run the command again")
        return reference


class Duplicates(Mapping[str, Reference]):
    """The duplicates of a set by key, read from their files on demand."""

    def __init__(self, index: SetIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index.duplicate_keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.duplicate_keys)

    def __getitem__(self, key: str) -> Reference:
        if (row := self._index.find_duplicate(key)) is not None:
            return self._index.duplicate(row)
        raise KeyError(key)


def item_of(key: str) -> str:
    """The part of a key that names the item."""
    return key.rpartition("_")[0]


def _find(key: str, keys: TextColumn, items: np.ndarray, order: np.ndarray) -> int | None:
    """The row of a key, or None.

    `keys` are those of the rows, `items` the hashes of their items (uint64 [rows, 2]), `order` the rows in ascending
    order of `items` (uint32 [rows]).
    """
    item_hash = int(hash_text(item_of(key)))
    position = bisect_left(order, item_hash, key=lambda row: int(items[row, 0]))
    while position < len(order) and int(items[order[position], 0]) == item_hash:
        if keys[int(order[position])] == key:
            return int(order[position])
        position += 1
    return None


def _build(data: ShardDataset, files: Sequence[str], writer: ArrayWriter) -> None:
    """Adds the columns of a set."""
    originals = _build_duplicates(data, files, writer)
    keys = TextColumnWriter(writer, "keys")
    items, numbers = writer.column("items", "<u8", 2), writer.column("numbers", "<u4")
    digests = writer.column("digests", "<u8")
    for shard in range(len(data.manifest.shards)):
        shard_keys, sha256s = data.ledger_of(shard)
        originals.find(shard_keys, shard, len(numbers))
        keys.append(shard_keys)
        items.append(hash_texts(map(item_of, shard_keys)))
        numbers.append(_numbers(shard_keys))
        digests.append(hash_texts(sha256s)[:, 0] if sha256s else np.zeros(len(shard_keys), "<u8"))
    writer.column("originals", "<u4").append(originals.rows)
    _add_order(writer, "order", items)


def _build_duplicates(data: ShardDataset, files: Sequence[str], writer: ArrayWriter) -> _Originals:
    """Adds the columns of the duplicates, except `originals`."""
    keys = TextColumnWriter(writer, "duplicate_keys")
    items, numbers = writer.column("duplicate_items", "<u8", 2), writer.column("duplicate_numbers", "<u4")
    lines, of_file = writer.column("lines", "<u8", 2), writer.column("duplicate_files", "<u4")
    names = writer.column("files", "u1", _NAME_BYTES)
    shards = {shard.name: number for number, shard in enumerate(data.manifest.shards)}
    targets, hashes = writer.scratch("<u4"), writer.scratch("<u8", 2)
    for number, name in enumerate(files):
        path = data.manifest.folder / name
        try:
            content = path.read_bytes()
        except storage_errors() as error:
            raise DataError(f"{path}: cannot be read ({first_line(error)})") from None
        rows = parse_references(content, path)
        if unknown := {row.shard for row in rows} - shards.keys():
            raise DataError(f"{path}: refers to {min(unknown)}, which the set does not have; {_verify(data)}")
        names.append(name.encode().ljust(_NAME_BYTES, b"\0"))
        keys.append([row.key for row in rows])
        items.append(hash_texts(item_of(row.key) for row in rows))
        numbers.append(_numbers([row.key for row in rows]))
        lines.append(_lines(content))
        of_file.append(np.full(len(rows), number))
        targets.append(np.array([shards[row.shard] for row in rows]))
        hashes.append(hash_texts(row.same_as for row in rows))
    _add_order(writer, "duplicate_order", items)
    return _Originals(data, targets.mapped(), hashes.mapped())


def _add_order(writer: ArrayWriter, name: str, items: GrowingColumn) -> None:
    """Adds the rows, sorted by the hashes of their items."""
    order = writer.column(name, "<u4")
    for rows in in_order(items.mapped()[:, 0]):
        order.append(rows)


class _Originals:
    """Finds the samples with the bytes of the duplicates, shard by shard.

    Attributes:
        rows: The number of each duplicate's original, once its shard was searched: uint32 [duplicates]
    """

    def __init__(self, data: ShardDataset, shards: np.ndarray, hashes: np.ndarray) -> None:
        """`shards` are those of the originals, uint32 [duplicates]; `hashes` of their keys, uint64 [duplicates, 2]."""
        self._data, self._hashes = data, hashes
        self._duplicates = np.argsort(shards, kind="stable")
        self._ends = np.cumsum(np.bincount(shards, minlength=len(data.manifest.shards)))
        self.rows = np.zeros(len(shards), "<u4")

    def find(self, keys: Sequence[str], shard: int, first: int) -> None:
        """Finds those in a shard, whose first sample has the number `first`. Raises DataError where one is missing."""
        duplicates = self._duplicates[self._ends[shard - 1] if shard else 0 : self._ends[shard]]
        if not len(duplicates):
            return
        hashes, original_hashes = hash_texts(keys), self._hashes[duplicates]
        order = np.argsort(hashes[:, 0], kind="stable")
        matches = order[np.minimum(np.searchsorted(hashes[order, 0], original_hashes[:, 0]), len(order) - 1)]
        if not (hashes[matches] == original_hashes).all():
            name = self._data.manifest.shards[shard].name
            raise DataError(
                f"{self._data.manifest.folder}: a duplicate refers to a photo that is not in {name}; "
                + _verify(self._data)
            )
        self.rows[duplicates] = first + matches


def _verify(data: ShardDataset) -> str:
    return f"`lavic verify {data.manifest.folder}` lists every difference"


def _lines(content: bytes) -> np.ndarray:
    """Start and end of each line that is not empty: int64 [lines, 2]."""
    ends = np.flatnonzero(np.frombuffer(content, "u1") == ord("\n"))
    if content and not content.endswith(b"\n"):
        ends = np.append(ends, len(content))
    starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    return np.stack([starts, ends], axis=1)[starts < ends]


def _numbers(keys: Sequence[str]) -> np.ndarray:
    """The number of each photo within its item, from the keys."""
    numbers = (key.rpartition("_")[2] for key in keys)
    return np.array([min(int(n), _MAX_NUMBER) if n.isdecimal() else _MAX_NUMBER for n in numbers], dtype="<u4")
