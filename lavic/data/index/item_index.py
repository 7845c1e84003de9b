"""The index of an item store: from an item's id to its row, its photo's key and its title.

It contains the store's lists of items, which are read on demand, and 20 bytes per item that are memory-mapped: half of
the hash of its id with its row, sorted by hash, and the offset of its line. `lavic embed` writes it into the store; if
it is missing or of other lists, it is built once per node.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lavic.errors import ChangedFileError, DataError, first_line
from lavic.storage.checksummed_json import digest_json
from lavic.storage.index.array_file import ArrayFile, ArrayWriter
from lavic.storage.index.shared import Build, index_name, shared_index, write_index
from lavic.storage.index.text_column import LazyTexts
from lavic.storage.index.text_hash import hash_text, hash_texts, in_order

KIND = "items/1"
_CACHED = 4096
"""Items in the LRU cache of lookups."""


class ItemList(Protocol):
    """One list of items, as in a store's manifest."""

    @property
    def name(self) -> str:
        """Its file is `items-<name>.jsonl`."""

    @property
    def items(self) -> int:
        """Number of items."""

    @property
    def items_sha256(self) -> str:
        """Digest of the file; empty if the manifest has none."""


@dataclass(frozen=True, slots=True)
class _ItemList:
    """An `ItemList` of a manifest."""

    name: str
    items: int
    items_sha256: str


@dataclass(frozen=True, slots=True)
class Item:
    """One row of a store."""

    row: int
    """Its number through all lists."""
    id: str
    key: str
    """Key of the photo that its tokens were computed from."""
    title: str
    views: int | None
    """Set if they are fewer than the store's."""


class ItemIndex:
    """The items of a store. All arrays are memory-mapped."""

    def __init__(self, file: ArrayFile, lists: Sequence[ItemList]) -> None:
        self._file, self._lists = file, lists
        # Access to single numbers is faster in a memoryview than in an array.
        self._hashes, self._rows = file["hashes"].data, file["rows"].data
        self._starts, self._first = file["starts"].data, file["first_rows"].data
        self._checked = bytearray(len(lists))
        self.find = lru_cache(_CACHED)(self._find)
        """`_find` with a cache."""

    @classmethod
    def open(cls, folder: Path, lists: Sequence[ItemList]) -> ItemIndex:
        """Opens the index of a store; builds it if it is missing.

        Raises:
            DataError: A list does not match the manifest.
        """
        source = _source(folder, lists)
        file = shared_index(_builder(folder, lists), kind=KIND, source=source, owner=folder, beside=folder)
        return cls(file, lists)

    @classmethod
    def of_store(cls, folder: Path) -> ItemIndex | None:
        """The index of a store from its manifest alone; None if there is no store of a known version.

        Raises:
            DataError: A list does not match the manifest.
        """
        try:
            parts = json.loads((folder / "manifest.json").read_text("utf-8"))["parts"]
            lists = [_ItemList(part["name"], part["items"], part.get("items_sha256", "")) for part in parts]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cls.open(folder, lists)

    def copy_to_memory(self) -> None:
        """Copies the arrays, 20 bytes an item: truncating a file that is memory-mapped kills the process."""
        names = ("hashes", "rows", "starts", "first_rows")
        self._hashes, self._rows, self._starts, self._first = (self._file[name].copy().data for name in names)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self.find(id) is not None

    def _find(self, id: str) -> Item | None:
        """An item by its id, the last of several; None if the store does not have it."""
        id_hash = int(hash_text(id))
        position = bisect_left(self._hashes, id_hash)
        last = None
        while position < len(self._hashes) and self._hashes[position] == id_hash:
            item = self.item(self._rows[position])
            last = item if item.id == id else last
            position += 1
        return last

    def item(self, row: int) -> Item:
        """The item of a row. Raises DataError where the index is damaged."""
        number, _ = self.place_of(row)
        if not self._checked[number]:
            self._check(number)
        try:
            values = json.loads(self._file.read("lines", self._starts[row], self._starts[row + 1]).decode())
        except ValueError:
            raise self._damaged() from None
        return Item(row, values["id"], values["key"], values["title"], values.get("views"))

    def place_of(self, row: int) -> tuple[int, int]:
        """The number of a row's list, and its position in the list."""
        number = bisect_right(self._first, row) - 1
        return number, row - self._first[number]

    def _check(self, number: int) -> None:
        """Compares a list with its digest, when it is first read."""
        start, end = (self._starts[self._first[n]] for n in (number, number + 1))
        expected = self._lists[number].items_sha256
        if expected and hashlib.sha256(self._file.read("lines", start, end)).hexdigest() != expected:
            raise self._damaged()
        self._checked[number] = True

    def _damaged(self) -> ChangedFileError:
        return ChangedFileError(f"{self._file.path}: damaged: remove this file, it will be built again")

    @property
    def ids(self) -> ItemIds:
        """The ids, in the order of the rows."""
        return ItemIds(self)


class ItemIds(LazyTexts):
    """The ids of a store."""

    def __init__(self, index: ItemIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def _get(self, index: int) -> str:
        return self._index.item(index).id

    def __contains__(self, id: object) -> bool:
        return id in self._index


def write_item_index(folder: Path, lists: Sequence[ItemList]) -> None:
    """Builds the index of a store in the store's folder. Raises DataError as `ItemIndex.open`."""
    write_index(index_path(folder, lists), _builder(folder, lists), kind=KIND, source=_source(folder, lists))


def index_path(folder: Path, lists: Sequence[ItemList]) -> Path:
    """The path of a store's index in the store."""
    return folder / index_name(KIND, _source(folder, lists))


def list_path(folder: Path, name: str) -> Path:
    """The path of a list of items."""
    return folder / f"items-{name}.jsonl"


def _source(folder: Path, lists: Sequence[ItemList]) -> str:
    """Digest of the lists; a list without a digest in the manifest counts by its size and modification time."""
    entries: list[Any] = []
    for part in lists:
        digest: Any = part.items_sha256
        if not digest:
            path = list_path(folder, part.name)
            try:
                status = path.stat()
            except OSError as error:
                raise _unreadable(path, error) from None
            digest = [status.st_size, status.st_mtime_ns]
        entries.append([part.name, part.items, digest])
    return digest_json({"lists": entries})


def _builder(folder: Path, lists: Sequence[ItemList]) -> Build:
    def build(writer: ArrayWriter) -> None:
        lines, starts = writer.column("lines", "u1"), writer.column("starts", "<i8")
        hashes, rows = writer.column("hashes", "<u8"), writer.column("rows", "<u4")
        first_rows, unsorted = writer.column("first_rows", "<i8"), writer.scratch("<u8")
        for part in lists:
            path = list_path(folder, part.name)
            data = _read(path, part)
            # Not splitlines(): a title may contain other line separators of Unicode.
            split = data.split(b"\n")[:-1]
            lengths = np.array([len(line) + 1 for line in split], "<i8")
            starts.append(len(lines) + np.cumsum(lengths) - lengths)
            first_rows.append(np.array([len(unsorted)]))
            lines.append(data)
            unsorted.append(hash_texts(_parse_id(line, path, row) for row, line in enumerate(split))[:, 0])
        starts.append(np.array([len(lines)]))
        first_rows.append(np.array([len(unsorted)]))
        values = unsorted.mapped()
        for chunk in in_order(values):
            hashes.append(values[chunk])
            rows.append(chunk)

    return build


def _read(path: Path, part: ItemList) -> bytes:
    """Reads a list and compares it with the manifest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    if (items := data.count(b"\n")) != part.items:
        raise DataError(f"{path}: {items} items, the manifest says {part.items}")
    if part.items_sha256 and hashlib.sha256(data).hexdigest() != part.items_sha256:
        raise DataError(f"{path}: does not match the manifest (sha256): run `lavic embed` again")
    return data


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}): run `lavic embed` again")


def _parse_id(line: bytes, path: Path, row: int) -> str:
    """The id in a line of a list; checked because lists of older stores have no digest."""
    try:
        item = json.loads(line)
        _ = item["key"], item["title"]
        return str(item["id"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}:{row + 1}: not an item ({first_line(error)}): run `lavic embed` again") from None
