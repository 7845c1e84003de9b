"""Embedding a catalogue and searching for conversations as Ray Data jobs."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lavic.errors import LavicError, first_line
from lavic.recommend.retrieval.build import Make
from lavic.recommend.retrieval.item_table import ItemTable
from lavic.recommend.retrieval.manifest import IndexManifest, MethodRecord
from lavic.recommend.retrieval.vectors.chunks import Chunk, make_chunk
from lavic.recommend.retrieval.vectors.sentence_encoder import SentenceEncoder
from lavic.recommend.retrieval.vectors.tokens_builder import TokenChunks
from lavic.shards.retrieval.search_work import Block, BlockRows, Encoder, Searcher
from lavic.shards.retrieval.settings import RetrieveSettings

Stage = tuple[Callable[..., Callable[[Any], Any]], tuple[Any, ...], bool]
"""What makes the function of an actor, its arguments, and whether the actor uses a GPU where there is one."""


class EmbedTexts:
    """Makes files of an index's vectors from the items' texts."""

    def __init__(self, table: ItemTable, settings: dict[str, Any], batch_size: int, previous: MethodRecord | None):
        self._encoder = SentenceEncoder(settings, batch_size=batch_size)
        self._table, self._previous = table, previous

    def __call__(self, chunk: Chunk) -> int:
        make_chunk(self._table.path.parent, chunk, self._table, self._encoder.documents, self._previous)
        return chunk.file.rows


def embed_on_ray(chosen: RetrieveSettings) -> Make:
    """What embeds on a Ray cluster: one actor for each GPU, else for each CPU."""

    def make(
        table: ItemTable,
        chunks: Sequence[Chunk],
        previous: MethodRecord | None,
        settings: Mapping[str, Any],
        done: Callable[[int], None],
    ) -> None:
        stage: Stage
        if "retriever" in settings:
            tokens_per_batch = chosen.tokens.tokens_per_batch
            stage = (TokenChunks, (table, dict(settings), chosen.store, previous, tokens_per_batch), True)
        else:
            stage = (EmbedTexts, (table, dict(settings), chosen.dense.batch_size, previous), True)
        for rows in _map(chunks, [stage], chosen):
            done(rows)

    return make


def search_on_ray(
    chosen: RetrieveSettings, manifest: IndexManifest, blocks: Sequence[Block], parts: int
) -> Iterator[BlockRows]:
    """Encodes and searches blocks on a Ray cluster; for `search_all`."""
    encode: Stage = (Encoder, (chosen, manifest), bool({"dense", "tokens"} & {*chosen.methods}))
    if parts == 1:
        yield from _map(blocks, [encode, (Searcher, (chosen, manifest, 0, 1), False)], chosen)
        return
    # encoded once, and searched in one part of the index after the other: a worker maps one part alone
    encoded = list(_map(blocks, [encode], chosen))
    for number in range(parts):
        yield from _map(encoded, [(Searcher, (chosen, manifest, number, parts), False)], chosen)


class _Actor:
    """Makes a function once, such as one that loads a model, and applies it to the value of each row."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        self._apply = make(*arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["error"]:
            return row
        try:
            return {"value": pickle.dumps(self._apply(pickle.loads(row["value"]))), "error": ""}
        except (LavicError, OSError) as error:
            return {"value": b"", "error": first_line(error)}


def _map(values: Sequence[Any], stages: Sequence[Stage], chosen: RetrieveSettings) -> Iterator[Any]:
    """Applies stages to values, each of which is a task of its own; yields the results in any order.

    Raises:
        LavicError: A stage failed, or an actor was lost.
    """
    import ray
    import ray.data

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    rows = [{"value": pickle.dumps(value), "error": ""} for value in values]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    for make, arguments, wants_gpu in stages:
        gpu = bool(wants_gpu and gpus)
        # all stages run at once: together they must fit
        share = max(1, cpus // len(stages)) if cpus >= len(stages) else 1
        count = min(len(rows), chosen.ray.workers or (gpus if gpu else share))
        data = data.map(
            _Actor,
            fn_constructor_args=(make, *arguments),
            compute=ray.data.ActorPoolStrategy(size=max(1, count)),
            num_cpus=1 if cpus >= len(stages) else cpus / len(stages),
            num_gpus=1 if gpu else None,
        )
    try:
        for row in data.iter_rows():
            if row["error"]:
                raise LavicError(f"{chosen.index}: {row['error']}; run the same command again to resume")
            yield pickle.loads(row["value"])
    except ray.exceptions.RayError as error:
        raise LavicError(f"the job on Ray failed ({first_line(error)}); run the same command again to resume") from None
