"""An index of a catalogue, opened for searching."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lavic.errors import ChangedFileError, ConfigError, DataError
from lavic.recommend.retrieval.bm25.search import Bm25Search
from lavic.recommend.retrieval.hits import Hits
from lavic.recommend.retrieval.item_table import ItemTable
from lavic.recommend.retrieval.manifest import FILE, IndexManifest, Shard
from lavic.recommend.retrieval.query import plain
from lavic.recommend.retrieval.vectors.approximate import Approximate
from lavic.recommend.retrieval.vectors.chunks import VectorFiles
from lavic.recommend.retrieval.vectors.search import VectorSearch

Rows = tuple[np.ndarray, np.ndarray]
"""Rows of an index with their scores, best first: int64 [n], float [n]."""


class TextEncoder(Protocol):
    """Makes vectors of queries."""

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """float [n, d]"""


class RetrievalIndex:
    """The items of a catalogue, to be searched by several methods.

    Files are mapped: they are in memory once, however many processes search, and little of them in each. Pickled it is
    its folder.

    Args:
        methods: Opens the files of these methods alone; by default of all.

    Attributes:
        folder: The index.
        shard: Which part of its items is searched.
        manifest: What it holds.
        methods: The methods that can be searched.
        table: Its items.
    """

    def __init__(
        self,
        folder: Path,
        manifest: IndexManifest,
        shard: Shard = (0, 1),
        methods: Sequence[str] | None = None,
    ) -> None:
        self.folder, self.manifest, self.shard = folder, manifest, shard
        self.methods = tuple(name for name in manifest.methods if methods is None or name in methods)
        self.table = ItemTable(folder / manifest.table, manifest.catalogue)
        self._encoders: dict[str, TextEncoder] = {}
        self._bm25: dict[str, Bm25Search] = {}
        self._vectors: dict[str, VectorSearch] = {}
        for name in self.methods:
            record = manifest.methods[name]
            if record.kind == "bm25":
                self._bm25[name] = Bm25Search(folder, record, self.table.rank, shard)
            else:
                approximate = Approximate(folder, record.approximate, shard) if record.approximate else None
                self._vectors[name] = VectorSearch(VectorFiles(folder, record, shard), self.table.rank, approximate)

        self._files: dict[Path, tuple[int, int]] = {}
        """Number and size of each file as it was mapped."""
        for name in manifest.file_names() - {FILE}:
            with suppress(FileNotFoundError):  # of another shard, or replaced since
                state = (folder / name).stat()
                self._files[folder / name] = state.st_ino, state.st_size

    @classmethod
    def open(cls, folder: str | Path, *, shard: Shard = (0, 1)) -> RetrievalIndex:
        """Opens an index that `lavic retrieve` made.

        Args:
            folder: The index.
            shard: Search one part of its items only, such as (2, 8): the third of eight; `merge` puts their results
                together.

        Raises:
            DataError: It is not there, cut short, or damaged.
        """
        folder = Path(folder)
        manifest = IndexManifest.read(folder)
        while True:
            try:
                return cls(folder, manifest, shard)
            except DataError:
                # A command that extends the index removes the files of the smaller one.
                if (changed := IndexManifest.read(folder)) == manifest:
                    raise
                manifest = changed

    def __reduce__(self) -> tuple[Any, ...]:
        return RetrievalIndex, (self.folder, self.manifest, self.shard, self.methods)

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, id: str) -> bool:
        return self.table.row_of(id) is not None

    @property
    def text_methods(self) -> tuple[str, ...]:
        """The methods that take a query as text."""
        return tuple(name for name in self.methods if name in self._bm25 or name in ENCODERS or name in self._encoders)

    def set_encoder(self, method: str, encoder: TextEncoder) -> None:
        """Uses an encoder for the queries of a method, in place of the one that the index names."""
        self._encoders[method] = encoder

    def check_files(self) -> None:
        """Refuses an index with a file that was truncated while mapped: reading beyond its end would kill the process.

        A file that was removed or replaced stays as it was for those who have mapped it.

        Raises:
            ChangedFileError: Names the file.
        """
        for path, (number, size) in self._files.items():
            try:
                now = path.stat()
            except OSError:
                continue
            if now.st_ino == number and now.st_size < size:
                raise ChangedFileError(
                    f"{path}: cut short while it was in use: remove this file and run the same `lavic retrieve` again"
                )

    def search(
        self,
        queries: Sequence[str],
        k: int,
        *,
        methods: Sequence[str] | None = None,
        exclude: Sequence[Collection[str]] | None = None,
    ) -> dict[str, list[Hits]]:
        """The best items for each query, by each method.

        Lists have no fillers: bm25 returns only items with a word of the query, and an empty query finds nothing.

        Args:
            queries: Texts, as `query_text` makes them of conversations.
            k: Items of a list, at most.
            methods: Some of `text_methods`; by default all.
            exclude: For each query, ids that its lists must not have.

        Returns:
            For each method a list for each query.

        Raises:
            ConfigError: The index has no such method, or a text stands in place of a list.
        """
        if isinstance(queries, str) or isinstance(methods, str):
            raise ConfigError("queries and methods are lists of texts, also where there is one")
        chosen = self.text_methods if methods is None else tuple(methods)
        max_rows = lengths(len(queries), k, exclude)
        results: dict[str, list[Hits]] = {}
        for method in chosen:
            method_queries = queries if method in self._bm25 else self.encode(method, queries)
            results[method] = self.hits(self.search_rows(method, method_queries, max_rows), k, exclude)
        return results

    def search_vectors(
        self,
        method: str,
        vectors: np.ndarray,
        k: int,
        *,
        exclude: Sequence[Collection[str]] | None = None,
        exact: bool = False,
    ) -> list[Hits]:
        """The items whose vectors are the most similar (cosine), for each query.

        Args:
            method: One that has vectors.
            vectors: float [queries, width]; one of zeros finds nothing.
            k: Items of a list, at most.
            exclude: For each query, ids that its list must not have.
            exact: Compare with every item, whether or not the index has an approximate search.

        Raises:
            ConfigError: The index has no such method.
            DataError: The vectors are of another width, or not finite.
        """
        max_rows = lengths(len(vectors), k, exclude)
        return self.hits(self.search_rows(method, vectors, max_rows, exact=exact), k, exclude)

    def search_rows(
        self, method: str, queries: Sequence[str] | np.ndarray, k: Sequence[int], *, exact: bool = False
    ) -> list[Rows]:
        """The best rows of each query with their scores, best first; `hits` makes ids of them.

        Args:
            queries: Texts for bm25, else vectors, float [queries, width].
            k: Rows of each query, at most.
            exact: As for `search_vectors`.

        Raises:
            ConfigError: The index has no such method.
            DataError: The vectors are of another width, or not finite.
        """
        if method in self._bm25:
            return self._bm25[method].search([plain(str(query)) for query in queries], k)
        return self._vector_search(method).search(np.asarray(queries), k, exact=exact)

    def merge(self, parts: Sequence[Rows], k: int) -> Rows:
        """The best rows of what was found in several shards, for one query."""
        rows = np.concatenate([rows for rows, _ in parts])
        scores = np.concatenate([scores for _, scores in parts])
        order = np.lexsort((self.table.rank[rows], -scores))[:k]
        return rows[order], scores[order]

    def hits(self, found: Sequence[Rows], k: int, exclude: Sequence[Collection[str]] | None = None) -> list[Hits]:
        """Rows as ids, without those that are excluded.

        Args:
            found: For each query, by `search_rows`.
            k: Items of a list, at most.
            exclude: For each query, ids that its list must not have.
        """
        return [
            Hits(self.table.ids_of(rows), scores.tolist()).without(exclude[number] if exclude is not None else (), k)
            for number, (rows, scores) in enumerate(found)
        ]

    def score(self, method: str, query: str, ids: Sequence[str]) -> list[float]:
        """The scores of given items for a query.

        An item that the index does not have has the lowest score there is: 0 for bm25, else -1.

        Raises:
            ConfigError: The index has no such method.
        """
        if method not in self._bm25:
            (vector,) = self.encode(method, [query])
            return self.score_vector(method, vector, ids)
        rows, positions = self._rows(ids)
        return self._filled(self._bm25[method].score(plain(query), rows), positions, len(ids), 0.0)

    def score_vector(self, method: str, vector: np.ndarray, ids: Sequence[str]) -> list[float]:
        """The cosines of given items with a query's vector, [width]; see `score`."""
        rows, positions = self._rows(ids)
        return self._filled(self._vector_search(method).score(vector, rows), positions, len(ids), -1.0)

    def encode(self, method: str, queries: Sequence[str]) -> np.ndarray:
        """The vectors of queries: float32 [n, width]; of an empty text zeros.

        Raises:
            ConfigError: The index has no such method, it takes no text, or a text stands in place of a list.
            DataError: Its model gives vectors of another width.
        """
        if isinstance(queries, str):
            raise ConfigError("queries are a list of texts, also where there is one")
        width = self._vector_search(method).width
        self.load_encoder(method)
        vectors = np.zeros((len(queries), width), np.float32)
        if self._vector_search(method).is_empty:
            return vectors
        if filled := [row for row, query in enumerate(queries) if plain(query).strip()]:
            encoded = np.asarray(self._encoders[method].queries([queries[row] for row in filled]))
            if encoded.shape != (len(filled), width):
                raise DataError(
                    f"{self.folder}: the model of `{method}` gives vectors of shape {encoded.shape} for {len(filled)} "
                    f"queries, and the index has vectors of {width} numbers: use the model that the index was made with"
                )
            vectors[filled] = encoded
        return vectors

    def load_encoder(self, method: str) -> None:
        """Loads what makes vectors of a method's queries, if it needs one and has none yet.

        Raises:
            ConfigError: It takes no text, or its model is not there or is another one.
            DataError: Its retriever is not there or is another one.
        """
        if method in self._bm25 or method in self._encoders:
            return
        if method not in ENCODERS:
            raise ConfigError(f"{self.folder}: `{method}` needs an encoder (set_encoder), or search_vectors")
        self._encoders[method] = ENCODERS[method](self.manifest.methods[method].settings)

    def _vector_search(self, method: str) -> VectorSearch:
        if method not in self._vectors:
            available = ", ".join(self.methods) or "none"
            raise ConfigError(
                f"{self.folder}: the index has no method `{method}`, only {available}; `lavic retrieve` adds one"
            )
        return self._vectors[method]

    def _rows(self, ids: Sequence[str]) -> tuple[np.ndarray, list[int]]:
        """The rows of those ids that the index has, and their places among the ids."""
        rows = [self.table.row_of(id) for id in ids]
        positions = [position for position, row in enumerate(rows) if row is not None]
        return np.array([rows[position] for position in positions], np.int64), positions

    @staticmethod
    def _filled(scores: np.ndarray, positions: Sequence[int], count: int, lowest: float) -> list[float]:
        filled = [lowest] * count
        for position, score in zip(positions, scores.tolist(), strict=True):
            filled[position] = score
        return filled


def lengths(count: int, k: int, exclude: Sequence[Collection[str]] | None) -> list[int]:
    """How many rows to look for, so that `k` are left for each query without those that are excluded.

    Raises:
        ConfigError: `k` is below 1.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1, not {k}")
    if exclude is not None and len(exclude) != count:
        raise ValueError(f"{len(exclude)} sets of excluded ids for {count} queries")
    return [k + len(exclude[row]) if exclude is not None else k for row in range(count)]


def _sentence_encoder(recorded: Mapping[str, Any]) -> TextEncoder:
    from lavic.recommend.retrieval.vectors.sentence_encoder import SentenceEncoder

    return SentenceEncoder(recorded)


def _two_tower_encoder(recorded: Mapping[str, Any]) -> TextEncoder:
    from lavic.recommend.retrieval.vectors.two_tower import TwoTowerEncoder

    return TwoTowerEncoder(recorded)


ENCODERS: dict[str, Any] = {"dense": _sentence_encoder, "tokens": _two_tower_encoder}
"""By method: makes what encodes its queries, from the settings that the index records."""
