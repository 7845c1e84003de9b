"""Embedding a catalogue and searching for conversations as Ray Data jobs."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavic.distributed.ray_session import RaySettings
from lavic.errors import LavicError, first_line
from lavic.recommend.retrieval.build import Make
from lavic.recommend.retrieval.item_table import ItemTable
from lavic.recommend.retrieval.manifest import MethodRecord
from lavic.recommend.retrieval.vectors.chunks import Chunk, make_chunk
from lavic.recommend.retrieval.vectors.sentence_encoder import SentenceEncoder
from lavic.recommend.retrieval.vectors.tokens_builder import TokenChunks
from lavic.shards.retrieval.search_work import Block, Encoder, Found, Searcher
from lavic.shards.retrieval.settings import RetrieveSettings

Row = dict[str, Any]


class EmbedChunks:
    """Makes files of an index's vectors: an actor that loads the model once."""

    def __init__(self, table: ItemTable, settings: dict[str, Any], batch_size: int, previous: MethodRecord | None):
        self._encoder = SentenceEncoder(settings, batch_size=batch_size)
        self._table, self._previous = table, previous

    def __call__(self, row: Row) -> Row:
        chunk: Chunk = pickle.loads(row["data"])
        try:
            make_chunk(self._table.path.parent, chunk, self._table, self._encoder.documents, self._previous)
        except (LavicError, OSError) as error:
            return {"rows": 0, "error": first_line(error)}
        return {"rows": chunk.file.rows, "error": ""}


class EmbedTokens:
    """Makes files of the vectors of item tokens: an actor that loads the retriever once."""

    def __init__(
        self, table: ItemTable, settings: dict[str, Any], store: Path, previous: MethodRecord | None, batch: int
    ) -> None:
        self._worker = TokenChunks(table, settings, store, previous, batch)

    def __call__(self, row: Row) -> Row:
        chunk: Chunk = pickle.loads(row["data"])
        try:
            self._worker.make(chunk)
        except (LavicError, OSError) as error:
            return {"rows": 0, "error": first_line(error)}
        return {"rows": chunk.file.rows, "error": ""}


def embed_on_ray(chosen: RetrieveSettings) -> Make:
    """What embeds on a Ray cluster: one actor for each GPU, else for each CPU."""

    def make(
        folder: Path,
        table: ItemTable,
        chunks: Sequence[Chunk],
        previous: MethodRecord | None,
        settings: Mapping[str, Any],
        done: Callable[[int], None],
    ) -> None:
        actor: tuple[type, tuple[Any, ...], bool]
        if "retriever" in settings:
            actor = (EmbedTokens, (table, dict(settings), chosen.store, previous, chosen.tokens.tokens_per_batch), True)
        else:
            actor = (EmbedChunks, (table, dict(settings), chosen.dense.batch_size, previous), True)
        rows = [{"data": pickle.dumps(chunk)} for chunk in chunks]
        for row in _map(rows, [actor], chosen.ray):
            if row["error"]:
                raise LavicError(f"{folder}: {row['error']}; run the same command again to go on")
            done(row["rows"])

    return make


class EncodeBlocks:
    """See `Encoder`."""

    def __init__(self, chosen: RetrieveSettings) -> None:
        self._encode = Encoder(chosen)

    def __call__(self, row: Row) -> Row:
        block: Block = pickle.loads(row["data"])
        return {"data": pickle.dumps(self._encode(block))}


class SearchBlocks:
    """See `Searcher`."""

    def __init__(self, chosen: RetrieveSettings, number: int, count: int) -> None:
        self._search = Searcher(chosen, number, count)

    def __call__(self, row: Row) -> Row:
        block: Block = pickle.loads(row["data"])
        return {"data": pickle.dumps(self._search(block))}


def search_on_ray(chosen: RetrieveSettings, blocks: Sequence[Block], parts: int) -> Iterator[Found]:
    """Encodes and searches blocks on a Ray cluster; for `search_all`."""
    rows = [{"data": pickle.dumps(block)} for block in blocks]
    encode = (EncodeBlocks, (chosen,), bool({"dense", "tokens"} & {*chosen.methods}))
    if parts == 1:
        found = _map(rows, [encode, (SearchBlocks, (chosen, 0, 1), False)], chosen.ray)
        yield from (pickle.loads(row["data"]) for row in found)
        return
    # encoded once, and searched in one part of the index after the other: a worker maps one part alone
    encoded = list(_map(rows, [encode], chosen.ray))
    for number in range(parts):
        found = _map(encoded, [(SearchBlocks, (chosen, number, parts), False)], chosen.ray)
        yield from (pickle.loads(row["data"]) for row in found)


def _map(rows: Sequence[Row], stages: Sequence[tuple[type, tuple[Any, ...], bool]], settings: RaySettings) -> Iterator:
    """Maps rows by actors; yields the results in any order.

    Args:
        rows: Each is a task of its own.
        stages: Class of the actors, its arguments, and whether an actor uses a GPU where there is one.
        settings: How many actors.
    """
    import ray
    import ray.data

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    data = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    for actor, arguments, wants_gpu in stages:
        gpu = bool(wants_gpu and gpus)
        # all stages run at once: together they must fit
        share = max(1, cpus // len(stages)) if cpus >= len(stages) else 1
        count = min(len(rows), settings.workers or (gpus if gpu else share))
        data = data.map(
            actor,
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(size=max(1, count)),
            num_cpus=1 if cpus >= len(stages) else cpus / len(stages),
            num_gpus=1 if gpu else None,
        )
    try:
        yield from data.iter_rows()
    except ray.exceptions.RayError as error:
        raise LavicError(f"the job on Ray failed ({first_line(error)}); run the same command again to go on") from None
