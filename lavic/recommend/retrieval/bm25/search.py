"""Search by words in an index."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lavic.recommend.retrieval.bm25.build import KIND, VOCABULARY
from lavic.recommend.retrieval.bm25.words import hash_words, words_of
from lavic.recommend.retrieval.item_table import open_array_file
from lavic.recommend.retrieval.manifest import MethodRecord, Shard

_RECENT = 1 << 15
"""Words whose places are kept."""
_BLOCKS = 8
"""Blocks of rows for each hit, of which the best are compared first."""
_SORTED = 4
"""Rows for each hit that are sorted at once."""


class Bm25Search:
    """The BM25 scores of an index, mapped; the words of a query select and add them, by bm25s.

    An item without a word of the query has no score: it is never returned.

    Args:
        rank: Place of each row's id in the order of ids.
        shard: Which part of the index to search.

    Raises:
        DataError: A file is missing, cut short, or of another index.
    """

    def __init__(self, folder: Path, record: MethodRecord, rank: np.ndarray, shard: Shard = (0, 1)) -> None:
        (vocabulary_file,) = (file for file in record.files if not file.rows_from_items)
        self._vocabulary = open_array_file(folder / vocabulary_file.name, VOCABULARY, vocabulary_file.source)["hashes"]
        self._rank = rank
        self._words = words_of()
        self._word_id = lru_cache(_RECENT)(self._find)
        self._parts: list[tuple[int, _Scores]] = []
        for start, file in record.rows_of(shard):
            arrays = open_array_file(folder / file.name, KIND, file.source)
            self._parts.append((start, _Scores(arrays["data"], arrays["indices"], arrays["indptr"], file.rows)))

    def search(self, queries: Sequence[str], k: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The best rows of each query with their scores, best first: int64 [<= k], float32 [<= k]."""
        return [self._search(query, max_rows) for query, max_rows in zip(queries, k, strict=True)]

    def score(self, query: str, rows: np.ndarray) -> np.ndarray:
        """The scores of some rows: float32 [n], 0 where a row has no word of the query."""
        word_ids = self._word_ids(query)
        scores = np.zeros(len(rows), np.float32)
        for start, part in self._parts:
            inside = np.flatnonzero((rows >= start) & (rows < start + part.rows))
            for word_id in word_ids.tolist() if len(inside) else ():
                positions, values = part.of_word(word_id, rows[inside] - start)
                scores[inside[positions]] += values
        return scores

    def _search(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        word_ids = self._word_ids(query)
        results: list[tuple[np.ndarray, np.ndarray]] = []
        for start, part in self._parts:
            if len(word_ids):
                scores = part.of_query(word_ids)
                rows = best_rows(scores, self._rank[start : start + len(scores)], k)
                results.append((rows + start, scores[rows]))
        if not results:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        if len(results) == 1:
            return results[0]
        rows, scores = (np.concatenate(parts) for parts in zip(*results, strict=True))
        order = np.lexsort((self._rank[rows], -scores))[:k]
        return rows[order], scores[order]

    def _word_ids(self, query: str) -> np.ndarray:
        """The ids of the query's words, in the query's order; unknown words are left out."""
        word_ids = map(self._word_id, self._words(query))
        return np.array([word_id for word_id in word_ids if word_id >= 0], np.int32)

    def _find(self, word: str) -> int:
        """The id of a word, which is its position in the vocabulary; -1 if no item has it."""
        (hash_,) = hash_words([word])
        word_id = int(np.searchsorted(self._vocabulary, hash_))
        return word_id if word_id < len(self._vocabulary) and self._vocabulary[word_id] == hash_ else -1


def best_rows(scores: np.ndarray, rank: np.ndarray, k: int) -> np.ndarray:
    """The rows of the `k` highest scores above 0, float32 [n], best first; equal scores in the order of `rank`."""
    rows = np.flatnonzero(scores >= _reached(scores, k))
    if len(rows) > _SORTED * k:  # many rows of the same score
        values = scores[rows]
        kth_score = np.partition(values, len(values) - k)[len(values) - k]
        higher, tied = rows[values > kth_score], rows[values == kth_score]
        remaining = k - len(higher)
        if len(tied) > remaining:
            tied = tied[np.argpartition(rank[tied], remaining - 1)[:remaining]]
        rows = np.concatenate([higher, tied])
    return rows[np.lexsort((rank[rows], -scores[rows]))[:k]]


def _reached(scores: np.ndarray, k: int) -> np.float32:
    """A score above 0 that at least k rows reach, as high as is quickly seen: the k-th best of the maxima of blocks."""
    size = len(scores) // (_BLOCKS * k)
    least = np.float32(0)
    if size > 1:
        # A block has every size-th row: the maximum over a few long axes is faster than over many short ones.
        block_maxima = scores[: len(scores) // size * size].reshape(size, -1).max(axis=0)
        least = np.partition(block_maxima, len(block_maxima) - k)[len(block_maxima) - k]
    return max(least, np.nextafter(np.float32(0), np.float32(1)))


@dataclass(frozen=True)
class _Scores:
    """The scores of a range of rows, by word."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    rows: int

    def of_query(self, word_ids: np.ndarray) -> np.ndarray:
        """The scores of all rows for the words of a query: float32 [rows]."""
        scores: np.ndarray = self._scorer.get_scores_from_ids(word_ids)
        return scores

    @cached_property
    def _scorer(self) -> Any:
        scorer = copy(_scorer())
        scorer.scores = {"data": self.data, "indices": self.indices, "indptr": self.indptr, "num_docs": self.rows}
        return scorer

    def of_word(self, word_id: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The positions of those rows that have a word, and their scores for it."""
        start, end = self.indptr[word_id : word_id + 2]
        word_rows = self.indices[start:end]
        if not len(word_rows):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        insertion = np.minimum(np.searchsorted(word_rows, rows), len(word_rows) - 1)
        positions = np.flatnonzero(word_rows[insertion] == rows)
        return positions, self.data[start:end][insertion[positions]]


@lru_cache(maxsize=1)
def _scorer() -> Any:
    """A bm25s scorer without scores, compiled once in a process where numba is installed."""
    import bm25s

    scorer = bm25s.BM25(backend="auto")
    if scorer.backend == "numba":
        scorer.activate_numba_scorer()  # at the first query; bm25s itself leaves it out
    scorer.nonoccurrence_array = None
    return scorer
