"""The methods of `lavic retrieve`: what makes each one's part of an index, and what makes its queries' vectors."""

from __future__ import annotations

from collections.abc import Callable
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
    """What makes the parts of an index.

    Args:
        chosen: Of the command.
        make: Embeds elsewhere (on Ray); None embeds here.

    Raises:
        ConfigError: A model is missing.
    """
    return [_BUILDERS[name](chosen, make) for name in chosen.methods]


def encoder(name: str, chosen: RetrieveSettings, manifest: IndexManifest) -> TextEncoder:
    """What makes the vectors of a method's queries, as the index records it.

    Raises:
        ConfigError: A model is missing, or is not the one that the index was made with.
    """
    return _ENCODERS[name](chosen, manifest)


def recorded_builder(
    name: str, record: MethodRecord, chosen: RetrieveSettings, make: Make | None = None
) -> MethodBuilder:
    """What makes a method that an index has for further items, as the index records it.

    Args:
        name: Of the method.
        record: Of the index.
        chosen: Of the command: the store, the servers, batch sizes.
        make: As for `builders`.

    Raises:
        ConfigError: The server's address is missing.
    """
    recorded = dict(record.settings)
    if name == "bm25":
        return Bm25Builder(Bm25Settings(**recorded))
    if name == "dense":
        return _dense_builder(recorded, chosen, make)
    if name == "tokens":
        return _tokens_builder(recorded, chosen, make)
    if not (chosen.endpoint.url and chosen.endpoint.model):
        raise ConfigError(f"{chosen.index}: the index has `endpoint` too: name its --endpoint.url and --endpoint.model")
    return _endpoint(chosen, make)


def _bm25(chosen: RetrieveSettings, make: Make | None) -> MethodBuilder:
    return Bm25Builder(chosen.bm25)


def _dense(chosen: RetrieveSettings, make: Make | None) -> MethodBuilder:
    return _dense_builder(dense_settings(chosen.dense), chosen, make)


def _dense_builder(recorded: dict[str, Any], chosen: RetrieveSettings, make: Make | None) -> MethodBuilder:
    return VectorBuilder(
        "dense",
        recorded,
        lambda: SentenceEncoder(recorded, batch_size=chosen.dense.batch_size).documents,
        make=make,
    )


def _endpoint(chosen: RetrieveSettings, make: Make | None) -> MethodBuilder:
    # the servers do the work: this process keeps as many requests in flight as they may get
    return VectorBuilder(
        "endpoint",
        endpoint_settings(chosen.endpoint, chosen.max_characters),
        lambda: EndpointEncoder(chosen.endpoint, chosen.max_characters).documents,
    )


def _tokens(chosen: RetrieveSettings, make: Make | None) -> MethodBuilder:
    return _tokens_builder(tokens_settings(chosen.tokens), chosen, make)


def _tokens_builder(recorded: dict[str, Any], chosen: RetrieveSettings, make: Make | None) -> MethodBuilder:
    return TokensBuilder(recorded, chosen.store, tokens_per_batch=chosen.tokens.tokens_per_batch, make=make)


_BUILDERS: dict[str, Callable[[RetrieveSettings, Make | None], MethodBuilder]] = {
    "bm25": _bm25,
    "dense": _dense,
    "endpoint": _endpoint,
    "tokens": _tokens,
}


def _dense_encoder(chosen: RetrieveSettings, manifest: IndexManifest) -> TextEncoder:
    recorded = manifest.methods["dense"].settings
    # the model may have been moved since
    return SentenceEncoder({**recorded, "model": chosen.dense.model}, batch_size=chosen.dense.batch_size)


def _tokens_encoder(chosen: RetrieveSettings, manifest: IndexManifest) -> TextEncoder:
    from lavic.model.two_tower.retriever import find_retriever

    recorded = dict(manifest.methods["tokens"].settings)
    if chosen.tokens.retriever is not None:
        recorded["bundle"] = str(find_retriever(chosen.tokens.retriever))
    return TwoTowerEncoder(recorded, tokens_per_batch=chosen.tokens.tokens_per_batch)


_ENCODERS: dict[str, Callable[[RetrieveSettings, IndexManifest], TextEncoder]] = {
    "dense": _dense_encoder,
    "endpoint": lambda chosen, manifest: EndpointEncoder(chosen.endpoint, chosen.max_characters),
    "tokens": _tokens_encoder,
}
