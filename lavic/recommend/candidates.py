"""Candidates for a conversation from the whole catalogue, with the scores of the methods that found them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lavic.data.schema import Conversation
from lavic.errors import ConfigError, DataError
from lavic.model.bundle import Bundle, BundleInfo
from lavic.model.item_store import ItemStore
from lavic.model.lora import adapter_off
from lavic.recommend.retrieval import RetrievalIndex, fuse, query_text
from lavic.recommend.retrieval.fusion import method_weights
from lavic.recommend.retrieval.index import TextEncoder
from lavic.recommend.retrieval.vectors.two_tower import NAME as TOKENS
from lavic.recommend.retrieval.vectors.two_tower import TwoTowerEncoder, check_retriever

FUSED_DEPTH = 200
"""Items of each method's list, at least, where several are fused."""
_DEEPER = 4
"""Factor by which a search is deepened that has found too few items of the store."""
_DEEPEST = 1 << 14
"""Items of a list, at most."""
Scores = Mapping[str, Mapping[str, float]]
"""Retrieval method -> item id -> score."""


@dataclass(frozen=True)
class Candidates:
    """The list to rank for one conversation."""

    ids: tuple[str, ...]
    scores: Scores = field(default_factory=dict)


class CandidateSearch:
    """Searches a catalogue's index for items that a store holds too.

    Args:
        index: Of the catalogue.
        store: Items that it does not hold cannot be ranked, and are left out.
        methods: Of the index; by default all that take text.
        weights: Of each method's ranks in the fusion, in the order of `methods`; by default all count the same.

    Raises:
        ConfigError: The index has no such method, or the weights are not one for each method.
    """

    def __init__(
        self, index: RetrievalIndex, store: ItemStore, methods: Sequence[str] = (), weights: Sequence[float] = ()
    ) -> None:
        self.index, self.store = index, store
        self.weights = method_weights(methods, weights)
        if unknown := [method for method in methods if method not in index.text_methods]:
            have = ", ".join(index.text_methods) or "none"
            raise ConfigError(f"--methods {unknown[0]}: not searched by text in {index.folder}, only {have}")
        self.methods = tuple(dict.fromkeys(methods)) or index.text_methods
        """Methods that are searched by."""

    @classmethod
    def open(
        cls, folder: Path, store: ItemStore, methods: Sequence[str] = (), weights: Sequence[float] = ()
    ) -> CandidateSearch:
        """Opens an index; no model is loaded. The arguments are those of the class.

        Raises:
            ConfigError: As the class.
            DataError: It is not whole, or its `tokens` were made from other item tokens or by another retriever.
        """
        search = cls(RetrievalIndex.open(folder), store, methods, weights)
        search._check_tokens()
        return search

    def _check_tokens(self) -> None:
        if TOKENS not in self.methods:
            return
        record = self.index.manifest.methods[TOKENS]
        check_retriever(record.settings)
        if missing := set(record.parts).difference(self.store.manifest.part_digests):
            raise DataError(
                f"{self.index.folder}: items of {self.store.folder} were embedded again ({len(missing)} of its parts) "
                "since the vectors of `tokens` were made: run the `lavic retrieve` that made the index again, with "
                f"--store {self.store.folder}: it makes what has changed"
            )

    @property
    def needs_model(self) -> bool:
        """Whether queries are embedded by the base model, see `load_encoders`."""
        return TOKENS in self.methods

    def load_encoders(self, bundle: Bundle | None = None) -> None:
        """Loads what embeds queries, so that a missing or wrong model is an error at the start.

        Args:
            bundle: A recommender's model, loaded with `merge=False`: it embeds the queries of `tokens`, its language
                adapter left out, unless the retriever has another base model.

        Raises:
            ConfigError, DataError: A model is not there, or not the one that the index was made with.
            LaunchError: What it needs is not installed.
        """
        if bundle is not None and self.needs_model:
            recorded = self.index.manifest.methods[TOKENS].settings
            base = BundleInfo.read(Path(recorded["bundle"]))
            if (base.fingerprint, base.prompt_version) == (bundle.info.fingerprint, bundle.info.prompt_version):
                self.index.set_encoder(TOKENS, _WithoutAdapter(TwoTowerEncoder(recorded, model=bundle), bundle))
        for method in self.methods:
            self.index.load_encoder(method)

    def search(
        self, conversations: Sequence[Conversation], count: int, exclude: Sequence[Collection[str]]
    ) -> list[Candidates]:
        """At most `count` candidates of each conversation, in the order of their fused ranks, without those to
        `exclude`. Where too few of the items found are in the store, it is searched again, for longer lists.
        """
        queries = [query_text(conversation) for conversation in conversations]
        results = [Candidates(())] * len(queries)
        pending = list(range(len(queries)))
        # Only a deep list shows that an item which leads one of them is far down in another. A single list is twice as
        # long, so that few items which the store lacks do not take a second search.
        depth = max(count, FUSED_DEPTH) if len(self.methods) > 1 else 2 * count
        while pending:
            pending_queries, pending_exclude = [queries[row] for row in pending], [exclude[row] for row in pending]
            by_method = self.index.search(pending_queries, depth, methods=self.methods, exclude=pending_exclude)
            incomplete = []
            for position, row in enumerate(pending):
                lists = {method: hits[position] for method, hits in by_method.items()}
                fused = fuse(lists, depth * len(lists), weights=self.weights).ids
                ids = tuple(item for item in fused if item in self.store)[:count]
                scores = {method: dict(zip(hits.ids, hits.scores, strict=True)) for method, hits in lists.items()}
                results[row] = Candidates(ids, scores)
                if len(ids) < count and any(len(hits) == depth for hits in lists.values()):
                    incomplete.append(row)
            pending = incomplete if depth < _DEEPEST else []
            depth = min(_DEEPER * depth, _DEEPEST)
        return results

    def score(self, conversation: Conversation, ids: Sequence[str]) -> Scores:
        """The scores of given candidates by every method that is searched by."""
        query = query_text(conversation)
        return {method: dict(zip(ids, self.index.score(method, query, ids), strict=True)) for method in self.methods}


class _WithoutAdapter:
    """Encodes queries while a model's language adapter is left out."""

    def __init__(self, encoder: TextEncoder, bundle: Bundle) -> None:
        self.encoder, self.bundle = encoder, bundle

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """As `TextEncoder`."""
        model: Any = self.bundle.backbone.model
        with adapter_off(model.model.language_model):
            return self.encoder.queries(texts)
