"""Exact search by vectors: products by blocks of rows, and the best of each query kept.

A product of matrices differs in its last bits with their shapes. So all rows that come close to a query's k best are
kept, and their scores are computed again, one by one and rounded: results depend neither on the other queries nor on
how the rows are divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lavic.errors import DataError
from lavic.recommend.retrieval.vectors.chunks import VectorFiles, unit_rows

if TYPE_CHECKING:
    from lavic.recommend.retrieval.vectors.approximate import Approximate

DECIMALS = 6
"""Decimals of a score."""
_NEAR = 4e-6
"""How far a product in float32 may be from the score."""
_QUERIES = 64
_RESCORED = 16
"""Queries whose rows are read at once."""
_SAMPLE = 4096


class VectorSearch:
    """Search among the vectors of a method.

    Args:
        files: The vectors.
        rank: Place of each row's id in the order of ids.
        approximate: Finds likely rows; None compares all.
    """

    def __init__(self, files: VectorFiles, rank: np.ndarray, approximate: Approximate | None = None) -> None:
        self._files, self._rank, self._approximate = files, rank, approximate
        self._searchable = {
            file: sum(len(vectors) - len(empty) for _, vectors, empty in files.blocks(file))
            for file in (approximate.files if approximate is not None else ())
        }
        """Rows with a vector of each file of the approximate search."""

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self._files.width

    @property
    def is_empty(self) -> bool:
        """Whether no row has a vector."""
        return self._files.is_empty

    def search(
        self, vectors: np.ndarray, k: Sequence[int], *, exact: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The best rows of each query with their scores, best first: int64 [<= k], float64 [<= k].

        Args:
            vectors: float [queries, width]; a query of zeros finds nothing.
            k: For each query.
            exact: Compare all rows, whether or not there is an approximate search.

        Raises:
            DataError: The vectors have another width, or values that are not finite.
        """
        queries = self.checked(vectors)
        results = [(np.zeros(0, np.int64), np.zeros(0))] * len(queries)
        nonzero = np.flatnonzero(queries.any(axis=1))
        for number, rows in zip(
            nonzero, self._search(queries[nonzero], np.array(k, np.int64)[nonzero], exact), strict=True
        ):
            results[number] = rows
        return results

    def _search(self, queries: np.ndarray, k: np.ndarray, exact: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `search`, for queries of length 1."""
        results = []
        for first in range(0, len(queries), _QUERIES):
            batch = slice(first, first + _QUERIES)
            if self._approximate is not None and not exact:
                proposed = self._proposed(self._approximate, queries[batch], k[batch])
            else:
                proposed = self._best_candidates(queries[batch], k[batch])
            for offset in range(0, len(proposed), _RESCORED):
                group = proposed[offset : offset + _RESCORED]
                # read at once: a query's rows are in as many files as there are
                blocks = np.split(
                    self._files.rows(np.concatenate(group)), np.cumsum([len(rows) for rows in group])[:-1]
                )
                for number, (rows, values) in enumerate(zip(group, blocks, strict=True), first + offset):
                    results.append(self._best(queries[number], rows, values, int(k[number])))
        return results

    def score(self, vector: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The scores of some rows for a query, [width]: float64 [n]."""
        return self._scores(self.checked(vector[None])[0], self._files.rows(rows))

    def checked(self, vectors: np.ndarray) -> np.ndarray:
        """Queries of length 1.

        Raises:
            DataError: As `search`.
        """
        values = np.asarray(vectors, np.float32)
        if values.ndim != 2 or (len(values) and values.shape[1] != self.width):
            raise DataError(f"query vectors of shape {values.shape}; the index has vectors of {self.width} numbers")
        return unit_rows(values, 0, "the queries")

    def _best(self, query: np.ndarray, rows: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = self._scores(query, vectors)
        order = np.lexsort((self._rank[rows], -scores))[:k]
        return rows[order], scores[order]

    @staticmethod
    def _scores(query: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        return np.round(vectors.astype(np.float64) @ query.astype(np.float64), DECIMALS) + 0.0

    def _proposed(self, approximate: Approximate, queries: np.ndarray, k: np.ndarray) -> list[np.ndarray]:
        """The rows that an approximate search proposes: int64 [some] for each query.

        A file that proposes fewer than k rows with a vector, although it has more, is searched exactly: each file by
        itself, so that the result does not depend on which files are searched together.
        """
        lists: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in queries]
        for file, proposed in approximate.propose(queries, k):
            masks = np.split(
                self._files.have_vectors(np.concatenate(proposed)), np.cumsum([len(rows) for rows in proposed])[:-1]
            )
            proposed = [rows[has_vector] for rows, has_vector in zip(proposed, masks, strict=True)]
            num_needed = np.minimum(k, self._searchable[file])
            too_few = [number for number, rows in enumerate(proposed) if len(rows) < num_needed[number]]
            if too_few:
                for number, rows in zip(
                    too_few, self._best_candidates(queries[too_few], k[too_few], file), strict=True
                ):
                    proposed[number] = rows
            for rows_of, rows in zip(lists, proposed, strict=True):
                rows_of.append(rows)
        return [np.concatenate(rows) for rows in lists]

    def _best_candidates(self, queries: np.ndarray, k: np.ndarray, rows: range | None = None) -> list[np.ndarray]:
        """The rows among which a query's k best are, of all or of some `rows`: int64 [some] for each query."""
        top_rows = _TopRows(k)
        for start, vectors, empty in self._files.blocks(rows):
            scores = queries @ vectors.T
            scores[:, empty] = -np.inf
            top_rows.add(scores, start)
        return top_rows.rows()


class _TopRows:
    """The rows that come close to the k best of each query, of all blocks so far."""

    def __init__(self, k: np.ndarray) -> None:
        self._k = k
        self._least = np.full(len(k), -np.inf, np.float32)
        """For each query what a score must reach."""
        self._scores = [np.zeros(0, np.float32)]
        self._rows = [np.zeros(0, np.int64)]
        self._queries = [np.zeros(0, np.int64)]

    def add(self, scores: np.ndarray, start: int) -> None:
        """Adds a block of scores, [queries, n], of the rows from `start` on."""
        if not scores.size:
            return
        if not np.isfinite(self._least).all():
            self._least = np.maximum(self._least, self._sampled(scores))
        passing = scores >= self._least[:, None]
        # one index into the flat array: quicker than two of nonzero
        flat = np.flatnonzero(passing)
        values = scores.ravel()[flat]
        flat, values = flat[values > -np.inf], values[values > -np.inf]
        queries, rows = np.divmod(flat, scores.shape[1])
        self._scores.append(values)
        self._rows.append(rows + start)
        self._queries.append(queries)
        self._reduce()

    def _sampled(self, scores: np.ndarray) -> np.ndarray:
        """A bound that some of the scores already reach k times."""
        sample = scores[:, :_SAMPLE]
        least = np.full(len(scores), -np.inf, np.float32)
        for k in np.unique(self._k):
            if 0 < k <= sample.shape[1]:
                same_k = self._k == k
                least[same_k] = np.partition(sample[same_k], sample.shape[1] - k, axis=1)[:, sample.shape[1] - k]
        return least - np.float32(_NEAR)

    def _reduce(self) -> None:
        """Drops what has fallen behind the k best."""
        scores, rows, queries = (np.concatenate(parts) for parts in (self._scores, self._rows, self._queries))
        order = np.lexsort((np.negative(scores), queries))
        scores, rows, queries = scores[order], rows[order], queries[order]
        counts = np.bincount(queries, minlength=len(self._k))
        first = np.cumsum(counts) - counts
        full = np.flatnonzero((counts >= self._k) & (self._k > 0))
        self._least[full] = np.maximum(self._least[full], scores[first[full] + self._k[full] - 1] - np.float32(_NEAR))
        passing = scores >= self._least[queries]
        self._scores, self._rows, self._queries = [scores[passing]], [rows[passing]], [queries[passing]]

    def rows(self) -> list[np.ndarray]:
        """The rows of each query."""
        bounds = np.cumsum(np.bincount(self._queries[0], minlength=len(self._k)))[:-1]
        return np.split(self._rows[0], bounds)
