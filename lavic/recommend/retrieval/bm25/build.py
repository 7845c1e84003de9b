"""The BM25 scores of every word in every item, in parts of rows.

Scores are those of bm25s (method `lucene`). Frequencies and the mean length are those of the whole catalogue, so the
parts can be searched by different machines. A vocabulary is kept as hashes: 48 million titles have millions of words.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeFloat, PositiveInt

from lavic.config import settings
from lavic.recommend.retrieval.bm25.words import hash_words, words_of
from lavic.recommend.retrieval.item_table import ItemTable
from lavic.recommend.retrieval.manifest import IndexFile, MethodRecord
from lavic.storage.atomic import atomic_open
from lavic.storage.checksummed_json import digest_json
from lavic.storage.index.array_file import ArrayWriter, GrowingColumn

KIND = "retrieval-bm25/1"
VOCABULARY = "retrieval-bm25-words/1"
_AT_ONCE = 20_000


@settings
class Bm25Settings:
    """Search by words."""

    k1: NonNegativeFloat = 1.5
    """BM25 k1 (term-frequency saturation)."""
    b: NonNegativeFloat = 0.75
    """BM25 b (length normalization), from 0 to 1."""
    part_rows: PositiveInt = 1 << 20
    """Items of a part, which is searched at once; results do not depend on it."""


class Bm25Builder:
    """Makes the part of an index that searches by words."""

    name = "bm25"
    parts: tuple[str, ...] = ()

    def __init__(self, chosen: Bm25Settings) -> None:
        self.settings: dict[str, Any] = {"k1": chosen.k1, "b": chosen.b, "part_rows": chosen.part_rows}

    def build(self, folder: Path, table: ItemTable, previous: MethodRecord | None = None) -> MethodRecord:
        """Makes the files anew: each score depends on the whole catalogue. `previous` is not used."""
        source = digest_json({"rows": table.order_digest(), "settings": self.settings})
        rows = self.settings["part_rows"]
        ranges = [(start, min(start + rows, len(table))) for start in range(0, len(table), rows)]
        with ArrayWriter(folder) as writer:
            parts = [_count(writer, table, start, end) for start, end in ranges]
            vocabulary, frequency = _vocabulary(parts)
            idf = np.log1p((len(table) - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
            mean = sum(int(part.lengths.sum()) for part in parts) / len(table) or 1.0
            vocabulary_file = IndexFile(f"bm25-words-{source[:16]}.safetensors", len(vocabulary), source, False)
            _write(folder, vocabulary_file, VOCABULARY, hashes=vocabulary)
            files = [vocabulary_file]
            for number, part in enumerate(parts):
                file = IndexFile(f"bm25-{number:05d}-{source[:16]}.safetensors", len(part.lengths), source)
                _write(folder, file, KIND, **self._part(part, vocabulary, idf, mean))
                files.append(file)
        return MethodRecord(kind="bm25", settings=self.settings, files=tuple(files))

    def _part(self, part: _Part, vocabulary: np.ndarray, idf: np.ndarray, mean: float) -> dict[str, np.ndarray]:
        """The scores of a part by word, each word's rows in ascending order."""
        rows, word_ids, counts = part.sorted_by(np.searchsorted(vocabulary, part.hashes))
        k1, b = self.settings["k1"], self.settings["b"]
        tf = counts.astype(np.float32)
        lengths = part.lengths[rows].astype(np.float64)
        data = idf[word_ids] * (tf / (k1 * ((1 - b) + b * lengths / mean) + tf))
        starts = np.zeros(len(vocabulary) + 1, np.int64)
        starts[1:] = np.bincount(word_ids, minlength=len(vocabulary))
        return {"data": data.astype("<f4"), "indices": rows.astype("<i4"), "indptr": np.cumsum(starts).astype("<i8")}


class _Part:
    """Word counts of a range of rows."""

    def __init__(self, pairs: GrowingColumn, lengths: np.ndarray, hashes: np.ndarray, frequency: np.ndarray) -> None:
        self._pairs = pairs
        self.lengths = lengths
        """Words of each row."""
        self.hashes = hashes
        """Hashes of the part's words."""
        self.frequency = frequency
        """Rows that have the word."""

    def sorted_by(self, catalogue_word_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, word and count of every pair of row and word, by word and then by row.

        Args:
            catalogue_word_ids: The number of each of the part's words in the catalogue's vocabulary.
        """
        pairs = self._pairs.mapped()
        word_ids = catalogue_word_ids[pairs[:, 1]]
        order = np.argsort(word_ids, kind="stable")
        return pairs[order, 0], word_ids[order], pairs[order, 2]


def _count(writer: ArrayWriter, table: ItemTable, start: int, end: int) -> _Part:
    """Counts the words of some rows."""
    word_ids: dict[str, int] = {}
    pairs = writer.scratch("<u4", 3)
    lengths = []
    for first, words, lengths_of_rows in _words(table, start, end):
        lengths.append(lengths_of_rows)
        ids = np.fromiter((word_ids.setdefault(word, len(word_ids)) for word in words), np.int64, len(words))
        rows = np.repeat(np.arange(first - start, first - start + len(lengths_of_rows)), lengths_of_rows)
        unique, counts = np.unique(rows << 32 | ids, return_counts=True)
        pairs.append(np.stack([unique >> 32, unique & 0xFFFFFFFF, counts], axis=1))
    frequency = np.bincount(pairs.mapped()[:, 1], minlength=len(word_ids)) if word_ids else np.zeros(0, np.int64)
    return _Part(pairs, np.concatenate(lengths), hash_words(word_ids), frequency)


def _words(table: ItemTable, start: int, end: int) -> Iterator[tuple[int, list[str], np.ndarray]]:
    """The words of some rows, one row after the other, and how many each has."""
    split_words = words_of()
    for first in range(start, end, _AT_ONCE):
        rows = [split_words(text) for text in table.texts(first, min(first + _AT_ONCE, end))]
        yield first, [word for words in rows for word in words], np.array([len(words) for words in rows], np.int64)


def _vocabulary(parts: list[_Part]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all words, sorted, and how many rows have each."""
    hashes = np.concatenate([part.hashes for part in parts])
    vocabulary, inverse = np.unique(hashes, return_inverse=True)
    frequency = np.bincount(inverse, np.concatenate([part.frequency for part in parts]), len(vocabulary))
    return vocabulary, frequency


def _write(folder: Path, file: IndexFile, kind: str, **columns: np.ndarray) -> None:
    with ArrayWriter(folder) as writer:
        for name, values in columns.items():
            writer.column(name, values.dtype.str).append(values)
        with atomic_open(folder / file.name) as out:
            writer.put_together(out, {"kind": kind, "source": file.source})
