"""The methods of `lavic retrieve`: what makes each one's part of an index, and what makes its queries' vectors."""

from __future__ import annotations

from typing import Any

from lavic.errors import ConfigError
from lavic.recommend.retrieval.bm25.build import Bm25Builder, Bm25Settings
from lavic.recommend.retrieval.build import Make, MethodBuilder, VectorBuilder
from lavic.recommend.retrieval.index import TextEncoder
from lavic.recommend.retrieval.manifest import IndexManifest, MethodRecord
from lavic.recommend.retrieval.vectors.endpoint_encoder import EndpointEncoder, endpoint_settings
from lavic.recommend.retrieval.vectors.sentence_encoder import SentenceEncoder, dense_settings
from lavic.recommend.retrieval.vectors.tokens_builder import TokensBuilder
from lavic.recommend.retrieval.vectors.two_tower import TwoTowerEncoder, tokens_settings
from lavic.shards.retrieval.settings import RetrieveSettings


def builders(chosen: RetrieveSettings, make: Make | None = None) -> list[MethodBuilder]:
    """What makes the parts of an index; `make` embeds elsewhere (on Ray).

    Raises:
        ConfigError: A model is missing.
    """
    return [_builder(name, chosen, make, {}) for name in chosen.methods]


def recorded_builder(name: str, record: MethodRecord, chosen: RetrieveSettings, make: Make | None) -> MethodBuilder:
    """What makes a method that an index has for further items, as the index records it.

    Raises:
        ConfigError: The server's address is missing.
    """
    if name == "endpoint" and not (chosen.endpoint.url and chosen.endpoint.model):
        raise ConfigError(f"{chosen.index}: the index has `endpoint` too: name its --endpoint.url and --endpoint.model")
    return _builder(name, chosen, make, dict(record.settings))


def _builder(name: str, chosen: RetrieveSettings, make: Make | None, recorded: dict[str, Any]) -> MethodBuilder:
    """What makes a method, by what an index records of its settings; without a record, by those of the command."""
    if name == "bm25":
        return Bm25Builder(Bm25Settings(**recorded) if recorded else chosen.bm25)
    if name == "dense":
        dense = recorded or dense_settings(chosen.dense)
        batch_size = chosen.dense.batch_size
        return VectorBuilder(name, dense, lambda: SentenceEncoder(dense, batch_size=batch_size).documents, make=make)
    if name == "tokens":
        tokens = recorded or tokens_settings(chosen.tokens)
        return TokensBuilder(tokens, chosen.store, tokens_per_batch=chosen.tokens.tokens_per_batch, make=make)
    # the servers do the work: this process keeps as many requests in flight as they may get
    return VectorBuilder(
        name,
        endpoint_settings(chosen.endpoint, chosen.max_characters),
        lambda: EndpointEncoder(chosen.endpoint, chosen.max_characters).documents,
    )


def encoder(name: str, chosen: RetrieveSettings, manifest: IndexManifest) -> TextEncoder:
    """What makes the vectors of a method's queries, as the index records it.

    Raises:
        ConfigError: A model is missing, or is not the one that the index was made with.
    """
    recorded = dict(manifest.methods[name].settings)
    if name == "dense":
        # the model may have been moved since
        return SentenceEncoder({**recorded, "model": chosen.dense.model}, batch_size=chosen.dense.batch_size)
    if name == "endpoint":
        return EndpointEncoder(chosen.endpoint, chosen.max_characters)
    from lavic.model.two_tower.retriever import find_retriever

    if chosen.tokens.retriever is not None:
        recorded["bundle"] = str(find_retriever(chosen.tokens.retriever))
    return TwoTowerEncoder(recorded, tokens_per_batch=chosen.tokens.tokens_per_batch)
