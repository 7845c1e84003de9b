"""The index of an item store: from an item's id to its row, its photo's key and its title.

It holds the store's lists of items, one after the other, and for each item 20 bytes that are mapped: half of the hash
of its id and its row, in the order of the hashes, and where its line starts. The lines are read when they are asked
for. `lavic embed` leaves it in the store; for a store without it, or with one of other lists, a node makes it once.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from lavic.errors import ChangedFileError, DataError, first_line
from lavic.storage.checksummed_json import digest_json
from lavic.storage.index.array_file import ArrayFile, ArrayWriter
from lavic.storage.index.shared import Build, index_name, shared_index, write_index
from lavic.storage.index.text_hash import hash_text, hash_texts, in_order

KIND = "items/1"
_RECENT = 4096
"""Items that are kept after they were looked up."""


class ItemList(Protocol):
    """One list of items, as a store's manifest names it."""

    @property
    def name(self) -> str:
        """Its file is `items-<name>.jsonl`."""

    @property
    def items(self) -> int:
        """How many."""

    @property
    def items_sha256(self) -> str:
        """Of the file; empty where the manifest does not say it."""


@dataclass(frozen=True, slots=True)
class _Named:
    """As `ItemList` says."""

    name: str
    items: int
    items_sha256: str


@dataclass(frozen=True, slots=True)
class Item:
    """One row of a store."""

    row: int
    """Counted through all lists."""
    id: str
    key: str
    """Of the photo that its tokens were made of."""
    title: str
    views: int | None
    """Where they are fewer than the store's."""


class ItemIndex:
    """The items of a store. All arrays are mapped."""

    def __init__(self, file: ArrayFile, lists: Sequence[ItemList]) -> None:
        """Reads the columns of a file."""
        self._file, self._lists = file, lists
        # one number at a time comes faster out of a memoryview than out of an array
        self._hashes, self._rows = file["hashes"].data, file["rows"].data
        self._starts, self._first = file["starts"].data, file["first_rows"].data
        self._checked = bytearray(len(lists))
        self.find = lru_cache(_RECENT)(self._find)
        """`_find`, of the items that were looked up last at once."""

    @classmethod
    def open(cls, folder: Path, lists: Sequence[ItemList]) -> ItemIndex:
        """The index of a store, made where there is none.

        Args:
            folder: The store.
            lists: Its lists of items, in their order.

        Raises:
            DataError: A list is not what the manifest says.
        """
        source = _source(folder, lists)
        file = shared_index(_builder(folder, lists), kind=KIND, source=source, owner=folder, beside=folder)
        return cls(file, lists)

    @classmethod
    def of_store(cls, folder: Path) -> ItemIndex | None:
        """The index of a store by its manifest alone; None where there is no store, or none that is known here.

        Raises:
            DataError: A list is not what the manifest says.
        """
        try:
            parts = json.loads((folder / "manifest.json").read_text("utf-8"))["parts"]
            lists = [_Named(part["name"], part["items"], part.get("items_sha256", "")) for part in parts]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cls.open(folder, lists)

    def copy_to_memory(self) -> None:
        """Copies what is mapped, 20 bytes an item: a file that is cut short while it is mapped ends the process."""
        names = ("hashes", "rows", "starts", "first_rows")
        self._hashes, self._rows, self._starts, self._first = (self._file[name].copy().data for name in names)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self.find(id) is not None

    def _find(self, id: str) -> Item | None:
        """An item by its id, the last where there are several; None where the store does not hold it."""
        wanted = int(hash_text(id))
        at = bisect_left(self._hashes, wanted)
        last = None
        while at < len(self._hashes) and self._hashes[at] == wanted:
            item = self.item(self._rows[at])
            last = item if item.id == id else last
            at += 1
        return last

    def item(self, row: int) -> Item:
        """The item of a row.

        Raises:
            DataError: The index is damaged.
        """
        number = self.list_of(row)
        if not self._checked[number]:
            self._check(number)
        try:
            values = json.loads(self._file.read("lines", self._starts[row], self._starts[row + 1]).decode())
        except ValueError:
            raise ChangedFileError(f"{self._file.path}: damaged: remove this file, and it is made again") from None
        return Item(row, values["id"], values["key"], values["title"], values.get("views"))

    def list_of(self, row: int) -> int:
        """The number of the list that a row is in."""
        return bisect_right(self._first, row) - 1

    def place_of(self, row: int) -> tuple[int, int]:
        """The number of the list that a row is in, and its place there."""
        number = self.list_of(row)
        return number, row - self._first[number]

    def _check(self, number: int) -> None:
        """Compares a list with its digest when it is first read."""
        start, end = (self._starts[self._first[n]] for n in (number, number + 1))
        wanted = self._lists[number].items_sha256
        if wanted and hashlib.sha256(self._file.read("lines", start, end)).hexdigest() != wanted:
            raise ChangedFileError(f"{self._file.path}: damaged: remove this file, and it is made again")
        self._checked[number] = True

    @property
    def ids(self) -> ItemIds:
        """The ids, in the order of the rows."""
        return ItemIds(self)


class ItemIds(Sequence[str]):
    """The ids of a store, read when they are asked for."""

    def __init__(self, index: ItemIndex) -> None:
        """Those of an index."""
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self._index.item(index).id

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and id in self._index

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def write_item_index(folder: Path, lists: Sequence[ItemList]) -> None:
    """Leaves the index of a store in the store.

    Raises:
        DataError: A list is not what the manifest says.
    """
    build, source = _builder(folder, lists), _source(folder, lists)
    write_index(index_path(folder, lists), build, kind=KIND, source=source)


def index_path(folder: Path, lists: Sequence[ItemList]) -> Path:
    """Where the index of a store stands in it."""
    return folder / index_name(KIND, _source(folder, lists))


def list_path(folder: Path, name: str) -> Path:
    """Where a list of items stands."""
    return folder / f"items-{name}.jsonl"


def _source(folder: Path, lists: Sequence[ItemList]) -> str:
    """Digest of the lists; one whose content the manifest does not tell is known by its size and time of change."""
    named: list[Any] = []
    for part in lists:
        digest: Any = part.items_sha256
        if not digest:
            path = list_path(folder, part.name)
            try:
                status = path.stat()
            except OSError as error:
                raise _unreadable(path, error) from None
            digest = [status.st_size, status.st_mtime_ns]
        named.append([part.name, part.items, digest])
    return digest_json({"lists": named})


def _builder(folder: Path, lists: Sequence[ItemList]) -> Build:
    def build(writer: ArrayWriter) -> None:
        lines, starts = writer.column("lines", "u1"), writer.column("starts", "<i8")
        hashes, rows = writer.column("hashes", "<u8"), writer.column("rows", "<u4")
        first_rows, unsorted = writer.column("first_rows", "<i8"), writer.scratch("<u8")
        for part in lists:
            path = list_path(folder, part.name)
            data = _read(path, part)
            # not splitlines(): a title may hold one of Unicode's own line separators
            split = data.split(b"\n")[:-1]
            lengths = np.array([len(line) + 1 for line in split], "<i8")
            starts.append(len(lines) + np.cumsum(lengths) - lengths)
            first_rows.append(np.array([len(unsorted)]))
            lines.append(data)
            unsorted.append(hash_texts(_parse_id(line, path, row) for row, line in enumerate(split))[:, 0])
        starts.append(np.array([len(lines)]))
        first_rows.append(np.array([len(unsorted)]))
        values = unsorted.mapped()
        for some in in_order(values):
            hashes.append(values[some])
            rows.append(some)

    return build


def _read(path: Path, part: ItemList) -> bytes:
    """A list, compared with the manifest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    if (items := data.count(b"\n")) != part.items:
        raise DataError(f"{path}: {items} items, the manifest says {part.items}")
    if part.items_sha256 and hashlib.sha256(data).hexdigest() != part.items_sha256:
        raise DataError(f"{path}: it is not the list that the manifest records: run `lavic embed` again")
    return data


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}): run `lavic embed` again")


def _parse_id(line: bytes, path: Path, row: int) -> str:
    """The id in one line of a list, which in older stores has no digest."""
    try:
        item = json.loads(line)
        _ = item["key"], item["title"]
        return str(item["id"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}:{row + 1}: not an item ({first_line(error)}): run `lavic embed` again") from None
