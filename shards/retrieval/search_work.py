"""The work of a search over many conversations: blocks of queries, which any worker encodes and searches.

Which queries share a block depends on their texts alone, so that no result depends on the workers, on the order of the
conversations, or on how the index is divided.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lavic.recommend.retrieval import Hits, RetrievalIndex
from lavic.recommend.retrieval.index import Rows, lengths
from lavic.recommend.retrieval.manifest import IndexManifest
from lavic.shards.retrieval.methods import encoder
from lavic.shards.retrieval.settings import RetrieveSettings

BLOCK = 256
"""Queries of a block."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Queries that are encoded and searched together."""

    number: int
    texts: tuple[str, ...]
    counts: tuple[int, ...]
    """Rows to find for each query."""
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Query vectors by method, where it has vectors: float32 [queries, width]."""


BlockRows = tuple[int, dict[str, list[Rows]]]
"""Number of a block, and for each method what was found for its queries."""


class Encoder:
    """Makes the vectors of blocks, in one process, which loads the methods' models."""

    def __init__(self, chosen: RetrieveSettings, manifest: IndexManifest) -> None:
        self.index = RetrievalIndex(chosen.index, manifest, methods=chosen.methods)
        self._methods = [name for name in chosen.methods if self.index.manifest.methods[name].kind == "vectors"]
        for name in self._methods:
            self.index.set_encoder(name, encoder(name, chosen, self.index.manifest))

    def __call__(self, block: Block) -> Block:
        return replace(block, vectors={name: self.index.encode(name, block.texts) for name in self._methods})


class Searcher:
    """Searches a part of an index for the queries of blocks."""

    def __init__(self, chosen: RetrieveSettings, manifest: IndexManifest, number: int, count: int) -> None:
        """Opens part `number` of `count` of the index."""
        self.settings = chosen
        self.index = RetrievalIndex(chosen.index, manifest, (number, count), chosen.methods)

    def __call__(self, block: Block) -> BlockRows:
        return block.number, {
            name: self.index.search_rows(name, block.vectors.get(name, block.texts), block.counts)
            for name in self.settings.methods
        }


Run = Callable[[RetrieveSettings, IndexManifest, Sequence[Block], int], Iterable[BlockRows]]
"""Encodes and searches blocks in each part of an index, of so many; yields what each part found, in any order."""


def run_here(
    chosen: RetrieveSettings, manifest: IndexManifest, blocks: Sequence[Block], parts: int
) -> Iterator[BlockRows]:
    """Searches in this process."""
    encode = Encoder(chosen, manifest)
    searchers = [Searcher(chosen, manifest, number, parts) for number in range(parts)]
    for block in blocks:
        encoded = encode(block)
        for searcher in searchers:
            yield searcher(encoded)


def search_all(
    chosen: RetrieveSettings,
    manifest: IndexManifest,
    queries: Sequence[str],
    exclude: Sequence[Collection[str]],
    *,
    parts: int,
    run: Run,
    done: Callable[[int], None],
) -> dict[str, list[Hits]]:
    """The lists of all queries, by method; none has an id that its query excludes.

    Args:
        chosen: Of the search.
        manifest: Of the index, the same for all workers.
        queries: Texts.
        exclude: For each query, ids that its lists must not have.
        parts: Of the index, which are searched apart.
        run: Where the work is done.
        done: Called with the number of queries of each block that is done.
    """
    k = chosen.k
    counts = lengths(len(queries), k, exclude)
    order = sorted(range(len(queries)), key=lambda row: (queries[row], counts[row]))
    rows_of = [order[start : start + BLOCK] for start in range(0, len(order), BLOCK)]
    blocks = [
        Block(number=number, texts=tuple(queries[row] for row in rows), counts=tuple(counts[row] for row in rows))
        for number, rows in enumerate(rows_of)
    ]
    index = RetrievalIndex(chosen.index, manifest, methods=())
    waiting: dict[int, list[dict[str, list[Rows]]]] = {}
    lists: dict[str, list[Hits]] = {name: [Hits()] * len(queries) for name in chosen.methods}
    for number, rows_found in run(chosen, manifest, blocks, parts):
        waiting.setdefault(number, []).append(rows_found)
        if len(waiting[number]) < parts:
            continue
        part_rows = waiting.pop(number)
        for name in chosen.methods:
            for position, row in enumerate(rows_of[number]):
                best = index.merge([part[name][position] for part in part_rows], counts[row])
                (lists[name][row],) = index.hits([best], k, [exclude[row]])
        done(len(rows_of[number]))
    return lists
