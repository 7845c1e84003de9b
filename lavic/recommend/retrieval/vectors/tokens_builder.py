"""Makes an index's vectors of item tokens from an item store.

A file of vectors records what each row was made from, so when items were embedded again only their rows are made anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lavic.errors import ConfigError, DataError
from lavic.recommend.retrieval.build import Make, build_chunks
from lavic.recommend.retrieval.item_table import ItemTable
from lavic.recommend.retrieval.manifest import MethodRecord
from lavic.recommend.retrieval.vectors.chunks import (
    CHUNK_ROWS,
    Chunk,
    chunk_source,
    plan_chunks,
    previous_arrays,
    write_chunk,
)
from lavic.recommend.retrieval.vectors.two_tower import NAME, TwoTowerEncoder
from lavic.storage.index.text_hash import hash_texts

if TYPE_CHECKING:
    from lavic.model.item_store import ItemStore


class TokensBuilder:
    """Makes the vectors of an index's items from the item store; see `MethodBuilder`.

    Args:
        recorded: By `tokens_settings`.
        store: The item store; needed only if something is to be made.
        tokens_per_batch: Of a forward pass.
        make: Makes chunks elsewhere (on Ray); None makes them here.
        chunk_rows: Rows of a file.

    Raises:
        DataError: The store is not whole.
    """

    name = NAME

    def __init__(
        self,
        recorded: Mapping[str, Any],
        store: Path | None,
        *,
        tokens_per_batch: int = 8192,
        make: Make | None = None,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        from lavic.model.item_store import StoreManifest

        self.settings = recorded
        self._store, self._tokens_per_batch, self._make, self._chunk_rows = store, tokens_per_batch, make, chunk_rows
        self.parts = StoreManifest.read(store).part_digests if store is not None else ()

    def build(self, folder: Path, table: ItemTable, previous: MethodRecord | None = None) -> MethodRecord:
        """See `MethodBuilder`.

        Raises:
            ConfigError: No store is named.
        """
        from lavic.model.item_store import ItemStore

        if (store := self._store) is None:
            raise ConfigError("--methods tokens needs --store, the item store with the items' tokens")
        sources = row_sources(ItemStore.open(store), table.ids)
        chunks = plan_chunks(self.name, self.settings, table, self._chunk_rows, sources)

        load = partial(TokenChunks, table, self.settings, store, previous, self._tokens_per_batch)
        return build_chunks(self, folder, table, chunks, previous, self._make, load)


class TokenChunks:
    """Makes files of item vectors, in one process."""

    def __init__(
        self,
        table: ItemTable,
        recorded: Mapping[str, Any],
        store: Path,
        previous: MethodRecord | None,
        tokens_per_batch: int,
    ) -> None:
        """Loads the retriever and opens the store; arguments as for `TokensBuilder`."""
        from lavic.model.item_store import ItemStore

        self._table, self._recorded, self._previous = table, recorded, previous
        self._encoder = TwoTowerEncoder(recorded, tokens_per_batch=tokens_per_batch)
        self._store = ItemStore.open(store)

    def __call__(self, chunk: Chunk) -> int:
        """Makes a chunk's file and returns its rows; those of the previous index with the same tokens are copied.

        Raises:
            DataError: The store is no longer the one that the work was planned for.
        """
        folder = self._table.path.parent
        ids = [self._table.ids[row] for row in range(chunk.start, chunk.end)]
        sources = row_sources(self._store, ids)
        if chunk_source(NAME, self._recorded, self._table, chunk.start, chunk.end, sources) != chunk.file.source:
            raise DataError(f"{self._store.folder}: the item store was changed meanwhile: run the same command again")
        vectors = np.zeros((len(ids), self._encoder.width), np.float32)
        is_new = np.ones(len(ids), bool)
        old = previous_arrays(folder, self._previous, chunk)
        if old is not None and "sources" in old:
            unchanged = np.flatnonzero(old["sources"] == sources[: len(old["sources"])])
            vectors[unchanged], is_new[unchanged] = old["vectors"][unchanged], False
        if is_new.any():
            vectors[is_new] = self._encoder.items(self._store, [ids[row] for row in np.flatnonzero(is_new)])
        write_chunk(folder, chunk, vectors, sources)
        return chunk.file.rows


def row_sources(store: ItemStore, ids: Sequence[str]) -> np.ndarray:
    """Hashes that change when an item's tokens or title change: uint64 [n]."""
    parts = store.manifest.part_digests
    texts = []
    for id in ids:
        item = store.items.find(id)
        number, row_of_part = store.items.place_of(item.row) if item is not None else (0, -1)
        texts.append(f"{parts[number]}:{row_of_part}" if item is not None else "")
    return hash_texts(texts)[:, 0]
