"""The methods of `lavic retrieve`: what makes each one's part of an index, and what makes its queries' vectors."""

from __future__ import annotations

from collections.abc import Callable

from lavic.recommend.retrieval.bm25.build import Bm25Builder
from lavic.recommend.retrieval.build import Make, MethodBuilder, VectorBuilder
from lavic.recommend.retrieval.index import TextEncoder
from lavic.recommend.retrieval.manifest import IndexManifest
from lavic.recommend.retrieval.vectors.endpoint_encoder import EndpointEncoder, endpoint_settings
from lavic.recommend.retrieval.vectors.sentence_encoder import SentenceEncoder, dense_settings
from lavic.recommend.retrieval.vectors.two_tower import TokensBuilder, TwoTowerEncoder, tokens_settings
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


def _bm25(chosen: RetrieveSettings, make: Make | None) -> MethodBuilder:
    return Bm25Builder(chosen.bm25)


def _dense(chosen: RetrieveSettings, make: Make | None) -> MethodBuilder:
    recorded = dense_settings(chosen.dense)
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
    return TokensBuilder(
        tokens_settings(chosen.tokens), chosen.store, tokens_per_batch=chosen.tokens.tokens_per_batch, make=make
    )


_BUILDERS: dict[str, Callable[[RetrieveSettings, Make | None], MethodBuilder]] = {
    "bm25": _bm25,
    "dense": _dense,
    "endpoint": _endpoint,
    "tokens": _tokens,
}
_ENCODERS: dict[str, Callable[[RetrieveSettings, IndexManifest], TextEncoder]] = {
    "dense": lambda chosen, manifest: SentenceEncoder(
        manifest.methods["dense"].settings, batch_size=chosen.dense.batch_size
    ),
    "endpoint": lambda chosen, manifest: EndpointEncoder(chosen.endpoint, chosen.max_characters),
    "tokens": lambda chosen, manifest: TwoTowerEncoder(
        manifest.methods["tokens"].settings, tokens_per_batch=chosen.tokens.tokens_per_batch
    ),
}
