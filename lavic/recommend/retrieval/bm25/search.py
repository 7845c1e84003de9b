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
        (words,) = (file for file in record.files if not file.rows_from_items)
        self._vocabulary = open_array_file(folder / words.name, VOCABULARY, words.source)["hashes"]
        self._rank = rank
        self._words = words_of()
        self._place = lru_cache(_RECENT)(self._find)
        self._parts: list[tuple[int, _Scores]] = []
        for start, file in record.rows_of(shard):
            arrays = open_array_file(folder / file.name, KIND, file.source)
            self._parts.append((start, _Scores(arrays["data"], arrays["indices"], arrays["indptr"], file.rows)))

    def search(self, queries: Sequence[str], k: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The best rows of each query with their scores, best first: int64 [<= k], float32 [<= k]."""
        return [self._search(query, most) for query, most in zip(queries, k, strict=True)]

    def score(self, query: str, rows: np.ndarray) -> np.ndarray:
        """The scores of some rows: float32 [n], 0 where a row has no word of the query."""
        words = self._word_ids(query)
        scores = np.zeros(len(rows), np.float32)
        for start, part in self._parts:
            inside = np.flatnonzero((rows >= start) & (rows < start + part.rows))
            for word in words.tolist() if len(inside) else ():
                places, values = part.of_word(word, rows[inside] - start)
                scores[inside[places]] += values
        return scores

    def _search(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        words = self._word_ids(query)
        results: list[tuple[np.ndarray, np.ndarray]] = []
        for start, part in self._parts:
            if len(words):
                scores = part.of_query(words)
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
        """The places of the query's words in the vocabulary, in the query's order; unknown words are left out."""
        places = map(self._place, self._words(query))
        return np.array([place for place in places if place >= 0], np.int32)

    def _find(self, word: str) -> int:
        """The place of a word in the vocabulary; -1 if no item has it."""
        (hash_,) = hash_words([word])
        place = int(np.searchsorted(self._vocabulary, hash_))
        return place if place < len(self._vocabulary) and self._vocabulary[place] == hash_ else -1


def best_rows(scores: np.ndarray, rank: np.ndarray, k: int) -> np.ndarray:
    """The rows of the `k` highest scores above 0, float32 [n], best first; equal scores in the order of `rank`."""
    rows = np.flatnonzero(scores >= _reached(scores, k))
    if len(rows) > _SORTED * k:  # many rows of the same score
        values = scores[rows]
        least = np.partition(values, len(values) - k)[len(values) - k]
        above, level = rows[values > least], rows[values == least]
        left = k - len(above)
        if len(level) > left:
            level = level[np.argpartition(rank[level], left - 1)[:left]]
        rows = np.concatenate([above, level])
    return rows[np.lexsort((rank[rows], -scores[rows]))[:k]]


def _reached(scores: np.ndarray, k: int) -> np.float32:
    """A score above 0 that at least k rows reach, as high as is quickly seen: the k-th best of the maxima of blocks."""
    size = len(scores) // (_BLOCKS * k)
    least = np.float32(0)
    if size > 1:
        # A block has every size-th row: the maximum over a few long axes is faster than over many short ones.
        most = scores[: len(scores) // size * size].reshape(size, -1).max(axis=0)
        least = np.partition(most, len(most) - k)[len(most) - k]
    return max(least, np.nextafter(np.float32(0), np.float32(1)))


@dataclass(frozen=True)
class _Scores:
    """The scores of a range of rows, by word."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    rows: int

    def of_query(self, words: np.ndarray) -> np.ndarray:
        """The scores of all rows for the words of a query: float32 [rows]."""
        scores: np.ndarray = self._scorer.get_scores_from_ids(words)
        return scores

    @cached_property
    def _scorer(self) -> Any:
        scorer = copy(_scorer())
        scorer.scores = {"data": self.data, "indices": self.indices, "indptr": self.indptr, "num_docs": self.rows}
        return scorer

    def of_word(self, word: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places of those rows that have a word, and their scores for it."""
        start, end = self.indptr[word : word + 2]
        having = self.indices[start:end]
        if not len(having):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        at = np.minimum(np.searchsorted(having, rows), len(having) - 1)
        places = np.flatnonzero(having[at] == rows)
        return places, self.data[start:end][at[places]]


@lru_cache(maxsize=1)
def _scorer() -> Any:
    """A bm25s scorer without scores, compiled once in a process where numba is installed."""
    import bm25s

    scorer = bm25s.BM25(backend="auto")
    if scorer.backend == "numba":
        scorer.activate_numba_scorer()  # at the first query; bm25s itself leaves it out
    scorer.nonoccurrence_array = None
    return scorer
