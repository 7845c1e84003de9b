"""The vectors of an index, in files of a fixed number of rows, which different processes can make.

A file says what it was made from (the rows' texts and the settings), so a complete one is kept when a build continues
after a stop, and when the catalogue has grown. Vectors have length 1. A row of zeros is an item without a
vector (no text, no photo): it is never found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavic.errors import DataError
from lavic.recommend.retrieval.item_table import ItemTable, is_readable, open_array_file
from lavic.recommend.retrieval.manifest import IndexFile, MethodRecord, Shard, identity
from lavic.storage.atomic import atomic_open
from lavic.storage.checksummed_json import digest_json
from lavic.storage.index.array_file import ArrayFile, ArrayWriter

KIND = "retrieval-vectors/1"
CHUNK_ROWS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows whose vectors are one file."""

    file: IndexFile
    start: int
    """First row."""

    @property
    def end(self) -> int:
        """The row after the last."""
        return self.start + self.file.rows


def plan_chunks(
    method: str,
    settings: Mapping[str, Any],
    table: ItemTable,
    chunk_rows: int = CHUNK_ROWS,
    sources: np.ndarray | None = None,
) -> list[Chunk]:
    """The files of a method's vectors.

    Args:
        method: Name, of which file names are made.
        settings: Of the method: what the vectors depend on.
        table: The items.
        chunk_rows: Rows of a file; the last has fewer.
        sources: What each row's vector is made from besides its text: uint64 [n].
    """
    chunks = []
    for number, start in enumerate(range(0, len(table), chunk_rows)):
        end = min(start + chunk_rows, len(table))
        source = chunk_source(method, settings, table, start, end, sources[start:end] if sources is not None else None)
        name = f"{method}-{number:05d}-{source[:16]}.safetensors"
        chunks.append(Chunk(file=IndexFile(name, end - start, source), start=start))
    return chunks


def chunk_source(
    method: str, settings: Mapping[str, Any], table: ItemTable, start: int, end: int, sources: np.ndarray | None = None
) -> str:
    """Digest of what a file is made from: settings and rows of the table; see `plan_chunks`."""
    made_from = {"method": method, "settings": identity(settings), "rows": _sha256(table.hashes(start, end))}
    return digest_json(made_from if sources is None else {**made_from, "sources": _sha256(sources)})


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def is_complete(folder: Path, chunk: Chunk) -> bool:
    """Whether a chunk's file is there and whole."""
    return is_readable(folder / chunk.file.name, KIND, chunk.file.source)


def write_chunk(folder: Path, chunk: Chunk, vectors: np.ndarray, sources: np.ndarray | None = None) -> None:
    """Writes a chunk's vectors, made to have length 1.

    Args:
        vectors: float [rows, d]
        sources: As for `plan_chunks`, of the chunk's rows; kept beside the vectors.

    Raises:
        DataError: A vector has values that are not finite; names its row.
        ValueError: Their number is not the chunk's.
        OSError: They cannot be written.
    """
    if vectors.ndim != 2 or len(vectors) != chunk.file.rows:
        raise ValueError(f"vectors of shape {vectors.shape} for {chunk.file.rows} rows")
    normalized = unit_rows(vectors, chunk.start, str(folder / chunk.file.name))
    with ArrayWriter(folder) as writer:
        writer.column("vectors", "<f4", normalized.shape[1]).append(normalized)
        writer.column("empty", "<i4").append(np.flatnonzero(~normalized.any(axis=1)))
        if sources is not None:
            writer.column("sources", "<u8").append(sources)
        with atomic_open(folder / chunk.file.name) as out:
            writer.put_together(out, {"kind": KIND, "source": chunk.file.source})


def unit_rows(vectors: np.ndarray, first: int, source: str) -> np.ndarray:
    """Vectors of length 1, float32; rows of zeros stay.

    Raises:
        DataError: A value is not finite.
    """
    values = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        row = first + int(np.flatnonzero(~np.isfinite(lengths[:, 0]))[0])
        raise DataError(f"{source}: vector {row} has values that are not finite (NaN or infinity)")
    return (values / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def previous_arrays(folder: Path, previous: MethodRecord | None, chunk: Chunk) -> ArrayFile | None:
    """The file of a chunk's first rows in the index of the same settings; None if there is no whole one."""
    start = 0
    for file in previous.files if previous else ():
        if start == chunk.start and file.rows <= chunk.file.rows:
            readable = is_readable(folder / file.name, KIND, file.source)
            return open_array_file(folder / file.name, KIND, file.source) if readable else None
        start += file.rows
    return None


def make_chunk(
    folder: Path,
    chunk: Chunk,
    table: ItemTable,
    embed: Callable[[Sequence[str]], np.ndarray],
    previous: MethodRecord | None = None,
) -> None:
    """Makes a chunk's file from the items' texts; an empty text gets zeros.

    Args:
        embed: From texts to vectors, float [n, d].
        previous: Of a smaller index, whose rows stand first in the same order.

    Raises:
        DataError: The vectors have another width than those of the smaller index.
    """
    old = previous_arrays(folder, previous, chunk)
    previous_vectors = np.asarray(old["vectors"]) if old is not None else np.zeros((0, 0), np.float32)
    texts = table.texts(chunk.start + len(previous_vectors), chunk.end)
    # each text once, so that items of the same text have the same vector
    number_of_text: dict[str, int] = {}
    numbers = [number_of_text.setdefault(text, len(number_of_text)) if text.strip() else -1 for text in texts]
    vectors = (
        np.asarray(embed(list(number_of_text)), np.float32)
        if number_of_text
        else np.zeros((0, previous_vectors.shape[1] or 1), np.float32)
    )
    if len(previous_vectors) and previous_vectors.shape[1] != vectors.shape[1]:
        if previous_vectors.any():
            raise DataError(_other_width(folder, previous_vectors.shape[1], vectors.shape[1]))
        previous_vectors = np.zeros(
            (len(previous_vectors), vectors.shape[1]), np.float32
        )  # there was no text among them
    rows = np.concatenate([vectors, np.zeros((1, vectors.shape[1]), np.float32)])[numbers]
    write_chunk(folder, chunk, np.concatenate([previous_vectors, rows]) if len(previous_vectors) else rows)


def vectors_record(
    folder: Path, settings: Mapping[str, Any], chunks: Sequence[Chunk], parts: tuple[str, ...] = ()
) -> MethodRecord:
    """The record of a method with all its chunks; for `parts` see `MethodRecord`.

    Raises:
        DataError: The chunks have vectors of different widths.
    """
    files = tuple(chunk.file for chunk in chunks)
    width = widest = 0
    for file in files:
        arrays = open_array_file(folder / file.name, KIND, file.source)
        other = arrays["vectors"].shape[1]
        if len(arrays["empty"]) == file.rows:
            widest = max(widest, other)  # a chunk whose items all have no text may have another width
        elif width and other != width:
            raise DataError(_other_width(folder, width, other))
        else:
            width = other
    width = width or widest
    return MethodRecord(kind="vectors", settings=settings, files=files, width=width, parts=parts)


def _other_width(folder: Path, before: int, now: int) -> str:
    return (
        f"{folder}: the model gives vectors of {now} numbers, and the index has vectors of {before}: it is another "
        "model of the same name; use another --index"
    )


class VectorFiles:
    """The vectors of an index, mapped.

    Args:
        shard: Which part of the index `blocks` yields.

    Raises:
        DataError: A file is missing, cut short, or of another index.

    Attributes:
        width: Numbers of a vector.
        is_empty: Whether no row has a vector.
    """

    def __init__(self, folder: Path, record: MethodRecord, shard: Shard = (0, 1)) -> None:
        self._chunks: list[tuple[int, np.ndarray, np.ndarray]] = []
        for start, file in record.rows_of():
            arrays = open_array_file(folder / file.name, KIND, file.source)
            self._chunks.append((start, arrays["vectors"], arrays["empty"]))
        first = record.rows_of(shard)
        self._shard = range(len(self._chunks))
        if shard != (0, 1):
            number_of_start = {start: number for number, (start, _, _) in enumerate(self._chunks)}
            self._shard = range(number_of_start[first[0][0]], number_of_start[first[-1][0]] + 1) if first else range(0)
        self.width = record.width
        self.is_empty = all(len(empty) == len(vectors) for _, vectors, empty in self._chunks)
        self._starts = np.array([start for start, _, _ in self._chunks])

    def __len__(self) -> int:
        return sum(len(vectors) for _, vectors, _ in self._chunks)

    def blocks(self, rows: range | None = None) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """First row, vectors float32 [n, width], and places of the rows without one, of each file.

        Args:
            rows: Yields these rows alone, whatever the shard; by default those of the shard.
        """
        for number in self._shard if rows is None else range(len(self._chunks)):
            start, vectors, empty = self._chunks[number]
            if vectors.shape[1] != self.width:
                continue
            if rows is None:
                yield start, vectors, empty
                continue
            first, end = max(rows.start - start, 0), min(rows.stop - start, len(vectors))
            if first < end:
                first_empty, end_empty = np.searchsorted(empty, [first, end])
                yield start + first, vectors[first:end], empty[first_empty:end_empty] - first

    def have_vectors(self, rows: np.ndarray) -> np.ndarray:
        """Which of some rows have a vector: bool [n]."""
        has_vector = np.ones(len(rows), bool)
        chunk_numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(chunk_numbers).tolist():
            start, _, empty = self._chunks[number]
            if len(empty):
                in_chunk = chunk_numbers == number
                has_vector[in_chunk] = ~np.isin(rows[in_chunk] - start, empty)
        return has_vector

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of some rows: float32 [n, width]."""
        result = np.empty((len(rows), self.width), np.float32)
        order = np.argsort(rows, kind="stable")
        bounds = [*np.searchsorted(rows[order], self._starts).tolist(), len(rows)]
        for (start, vectors, _), first, end in zip(self._chunks, bounds, bounds[1:], strict=False):
            if first < end:
                positions = order[first:end]
                # a file of no vectors at all has no width
                result[positions] = vectors[rows[positions] - start] if vectors.shape[1] == self.width else 0
        return result
