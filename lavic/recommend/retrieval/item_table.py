"""The items of an index: ids and texts by row, in one mapped file.

A row keeps its number for good: a larger catalogue adds rows at the end. `rank` is the place of a row's id among all
ids in order, so that ties are broken by id without reading one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from lavic.errors import DataError
from lavic.storage.atomic import atomic_open
from lavic.storage.index.array_file import ArrayFile, ArrayFileError, ArrayWriter, GrowingColumn
from lavic.storage.index.text_column import TextColumn, TextColumnWriter
from lavic.storage.index.text_hash import HashSet, hash_text, hash_texts, in_order

KIND = "retrieval-items/2"
_FIXED = 32
"""Bytes of an id, up to which ids are kept in a second column of one width: many are read at once there."""
_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class Row:
    """An item to be indexed."""

    id: str
    text: str


class ItemTable:
    """The rows of an index, opened for reading. All arrays are mapped.

    Raises:
        DataError: It is not there, cut short, or another one.

    Attributes:
        ids: By row.
        rank: int32 [n], the place of each row's id in the order of ids.
        digest: Of ids and texts, whatever their order.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self._file = open_array_file(path, KIND, digest)
        self.path, self.digest = path, digest
        self.ids = TextColumn(self._file, "id")
        self.rank = self._file["rank"]
        self._starts, self._hashes, self._sorted = self._file["starts"], self._file["hashes"], self._file["sorted"]
        self._rows = self._file["rows"]
        self._fixed: np.ndarray | None = None
        if "fixed" in self._file:
            fixed = self._file["fixed"]
            self._fixed = fixed.view(f"S{fixed.shape[1]}")[:, 0]

    def __len__(self) -> int:
        return len(self.rank)

    def texts(self, start: int, end: int) -> list[str]:
        """The texts of some rows."""
        if start >= end:
            return []
        first_byte = int(self._starts[start])
        data = self._file.read("texts", first_byte, int(self._starts[end]))
        ends = (self._starts[start : end + 1] - first_byte).tolist()
        return [data[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(ends)]

    def ids_of(self, rows: np.ndarray) -> list[str]:
        """The ids of some rows, int64 [n]."""
        if self._fixed is None:
            return [self.ids[row] for row in rows.tolist()]
        data = self._fixed[rows].tolist()
        try:
            return list(map(bytes.decode, data))
        except UnicodeDecodeError:  # lone surrogates
            return [id.decode("utf-8", "surrogatepass") for id in data]

    def row_of(self, id: str) -> int | None:
        """The row of an id; None where the index does not have it."""
        id_hash = hash_text(id)
        index = int(np.searchsorted(self._sorted, id_hash))
        while index < len(self._sorted) and self._sorted[index] == id_hash:
            if self.ids[row := int(self._rows[index])] == id:
                return row
            index += 1
        return None

    def hashes(self, start: int, end: int) -> np.ndarray:
        """Hashes of id and text of some rows: uint64 [end - start, 2]."""
        return self._hashes[start:end]

    def order_digest(self) -> str:
        """Digest of ids and texts in the order of the rows, which every file about rows depends on."""
        return _order_digest(self._hashes)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """The items from a row on."""
        for first in range(start, len(self), _AT_ONCE):
            end = min(first + _AT_ONCE, len(self))
            yield from map(Row, self.ids[first:end], self.texts(first, end))

    def __reduce__(self) -> tuple[type[ItemTable], tuple[Path, str]]:
        return ItemTable, (self.path, self.digest)


def write_item_table(
    folder: Path, rows: Iterable[Row], *, old: ItemTable | None = None
) -> tuple[ItemTable, dict[str, int]]:
    """Writes the table of a catalogue.

    Args:
        folder: The index.
        rows: Items; of several with one id the first counts.
        old: A table whose rows stand first, as they are; `rows` must hold all of them.

    Returns:
        The table, and counts: `rows` read, and rows of an id that was `repeated`.

    Raises:
        DataError: There is no item, an id is too long, or a row of `old` is missing or has another text.
        OSError: It cannot be written.
    """
    with ArrayWriter(folder) as writer:
        ids = TextColumnWriter(writer, "id")
        texts, starts, hashes = (
            writer.column("texts", "u1"),
            writer.column("starts", "<u8"),
            writer.column("hashes", "<u8", 2),
        )
        id_hashes, scratch = writer.scratch("<u8", 2), _Scratch(writer)
        for batch in _batches(rows):
            scratch.append(batch)
        is_new = _new_rows(scratch.id_hashes.mapped(), old)
        if old is not None:
            _check_nothing_removed(old, scratch)

        def add(batch: Sequence[Row]) -> None:
            try:
                ids.append([row.id for row in batch])
            except ValueError as error:
                raise DataError(f"an item id is {error}; ids have at most 255 bytes") from None
            data = [row.text.encode("utf-8", "surrogatepass") for row in batch]
            lengths = np.array([len(text) for text in data], "<u8")
            starts.append(len(texts) + np.cumsum(lengths) - lengths)
            texts.append(b"".join(data))
            hashes.append(_row_hashes(batch))
            id_hashes.append(hash_texts(row.id for row in batch))

        for batch in _batches(old.rows() if old is not None else ()):
            add(batch)
        for batch in scratch.pieces(is_new):
            add(batch)
        count = len(id_hashes)
        if not count:
            raise DataError("the catalogue has no item to index")
        starts.append(np.array([len(texts)]))
        first = np.ascontiguousarray(id_hashes.mapped()[:, 0])
        order, by_hash = writer.column("sorted", "<u8"), writer.column("rows", "<u4")
        for positions in in_order(first):
            order.append(first[positions])
            by_hash.append(positions)
        all_ids = _all_ids(old, scratch, is_new)
        writer.column("rank", "<i4").append(_ranks(all_ids))
        # numpy takes zero bytes at the end for filling
        if all_ids.itemsize <= _FIXED and np.array_equal(np.strings.str_len(all_ids), ids.lengths()):
            fixed = writer.column("fixed", "u1", all_ids.itemsize)
            fixed.append(all_ids.view("u1").reshape(len(all_ids), -1))
        digest = _digest(hashes.mapped())
        counts = {"rows": len(scratch), "repeated": len(scratch) - int(is_new.sum()) - (len(old) if old else 0)}
        # Named by the order too: a catalogue in another order must not replace the table that other files are about.
        path = folder / f"items-{_order_digest(hashes.mapped())[:16]}.safetensors"
        with atomic_open(path) as file:
            writer.put_together(file, {"kind": KIND, "source": digest})
    table = ItemTable(path, digest)
    return table, counts


def open_array_file(path: Path, kind: str, source: str) -> ArrayFile:
    """A file of an index.

    Raises:
        DataError: It is not there, cut short, or another one.
    """
    try:
        return ArrayFile(path, kind=kind, source=source)
    except FileNotFoundError:
        raise DataError(f"{path}: missing: `lavic retrieve` with --items makes it again") from None
    except (ArrayFileError, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise DataError(f"{path}: {reason}: `lavic retrieve` with --items makes it again") from None


def is_readable(path: Path, kind: str, source: str) -> bool:
    """Whether a file of an index is there and whole."""
    try:
        ArrayFile(path, kind=kind, source=source)
    except (ArrayFileError, OSError):
        return False
    return True


class _Scratch:
    """Rows as they were read, on the disk."""

    def __init__(self, writer: ArrayWriter) -> None:
        self._data: GrowingColumn = writer.scratch("u1")
        self._lengths = writer.scratch("<u4", 2)
        self.id_hashes = writer.scratch("<u8", 2)
        self.row_hashes = writer.scratch("<u8", 2)

    def append(self, rows: Sequence[Row]) -> None:
        encoded = [(row.id.encode("utf-8", "surrogatepass"), row.text.encode("utf-8", "surrogatepass")) for row in rows]
        self._data.append(b"".join(part for pair in encoded for part in pair))
        self._lengths.append(np.array([[len(id), len(text)] for id, text in encoded], "<u4"))
        self.id_hashes.append(hash_texts(row.id for row in rows))
        self.row_hashes.append(_row_hashes(rows))

    def __len__(self) -> int:
        return len(self._lengths)

    def pieces(self, selected: np.ndarray) -> Iterator[list[Row]]:
        """The rows for which `selected`, bool [n], is true."""
        data, lengths = self._data.mapped(), self._lengths.mapped()
        offset = 0
        for first in range(0, len(lengths), _AT_ONCE):
            batch = lengths[first : first + _AT_ONCE].astype(np.int64)
            block = data[offset : offset + int(batch.sum())].tobytes()
            offset += len(block)
            rows, start = [], 0
            for (id, text), keep in zip(batch.tolist(), selected[first : first + _AT_ONCE].tolist(), strict=True):
                if keep:
                    id_end, end = start + id, start + id + text
                    rows.append(
                        Row(
                            block[start:id_end].decode("utf-8", "surrogatepass"),
                            block[id_end:end].decode("utf-8", "surrogatepass"),
                        )
                    )
                start += id + text
            if rows:
                yield rows


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _row_hashes(rows: Sequence[Row]) -> np.ndarray:
    return hash_texts(f"{row.id}\0{row.text}" for row in rows)


def _new_rows(id_hashes: np.ndarray, old: ItemTable | None) -> np.ndarray:
    """Which of the rows that were read have an id that is new: neither in the old table nor in a row before."""
    order = np.lexsort((np.arange(len(id_hashes)), id_hashes[:, 1], id_hashes[:, 0]))
    ordered = id_hashes[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    is_new = np.zeros(len(order), bool)
    is_new[order] = is_first
    if old is not None:
        is_new &= ~HashSet(hash_texts(old.ids)).holds(id_hashes)
    return is_new


def _check_nothing_removed(old: ItemTable, scratch: _Scratch) -> None:
    """Refuses a catalogue that lacks a row of the old table."""
    missing = np.flatnonzero(~HashSet(scratch.row_hashes.mapped()).holds(old.hashes(0, len(old))))
    if len(missing):
        examples = ", ".join(old.ids[int(row)] for row in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(
            f"{old.path.parent}: --extend adds items, but {len(missing)} of the index are gone from the catalogue or "
            f"have another text ({examples}): make a new index in another folder"
        )


def _all_ids(old: ItemTable | None, scratch: _Scratch, is_new: np.ndarray) -> np.ndarray:
    """The ids of all rows as bytes, [n]."""
    ids = [id.encode("utf-8", "surrogatepass") for id in (old.ids if old is not None else ())]
    ids += [row.id.encode("utf-8", "surrogatepass") for rows in scratch.pieces(is_new) for row in rows]
    return np.array(ids, "S")


def _ranks(ids: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(ids), "<i4")
    ranks[np.argsort(ids, kind="stable")] = np.arange(len(ids))
    return ranks


def _order_digest(hashes: np.ndarray) -> str:
    """The digest of all rows in their order."""
    return hashlib.sha256(np.ascontiguousarray(hashes).tobytes()).hexdigest()


def _digest(hashes: np.ndarray) -> str:
    """The digest of all rows, whatever their order."""
    digest = hashlib.sha256(str(len(hashes)).encode())
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    digest.update(np.ascontiguousarray(hashes[order]).tobytes())
    return digest.hexdigest()
