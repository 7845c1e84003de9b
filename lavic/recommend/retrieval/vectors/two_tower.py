"""Search by item tokens: a two-tower retriever's vectors of items and queries.

A retriever has one head for new conversations and others, each of which was trained without a fold of the training
conversations. An item's vector holds the vectors of all heads side by side; a query's is zero but for the part of its
own head, so one inner product compares a training conversation by a head that has not seen it. Scores are cosines
divided by the root of the number of heads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import PositiveInt

from lavic.config import settings
from lavic.data.schema import Conversation, Turn
from lavic.errors import ConfigError, DataError
from lavic.recommend.retrieval.query import TURN_END

if TYPE_CHECKING:
    from lavic.model.bundle import Bundle
    from lavic.model.item_store import ItemStore
    from lavic.model.two_tower.retriever import RetrieverInfo

NAME = "tokens"
_ITEMS = 1024
"""Items that are embedded at a time."""

log = logging.getLogger(__name__)


@settings
class TokensSettings:
    """Search by item tokens and titles."""

    retriever: Path | None = None
    """Run of `lavic tune-retriever`, or its bundle."""
    folds: bool = True
    """Keep the items' vectors of every head, so that lists for the retriever's own training conversations are made by
    heads that have not seen them. Without it the vectors are smaller by the number of heads, and these lists are
    optimistically biased: for an index that answers new conversations alone."""
    tokens_per_batch: PositiveInt = 8192
    """Tokens of a forward pass of the base model, padding included."""


def tokens_settings(chosen: TokensSettings) -> dict[str, Any]:
    """What the vectors depend on, as an index records it; no model is loaded.

    Raises:
        ConfigError: No retriever is named.
        DataError: It is not whole.
    """
    from lavic.model.two_tower.retriever import RetrieverInfo, find_retriever

    if chosen.retriever is None:
        raise ConfigError("--methods tokens needs --tokens.retriever, the run of `lavic tune-retriever`")
    folder = find_retriever(chosen.retriever)
    info = RetrieverInfo.read(folder)
    num_heads = 1 + (info.folds if chosen.folds else 0)
    return {"bundle": str(folder.absolute()), **_digests(folder, info), "heads": num_heads}


def _digests(folder: Path, info: RetrieverInfo) -> dict[str, Any]:
    """Digests that identify a retriever's bundle."""
    from lavic.model.bundle import BundleInfo

    base = BundleInfo.read(folder)
    return {"retriever": info.digest, "base": base.fingerprint, "vision_adapter": base.vision_adapter}


def check_retriever(recorded: Mapping[str, Any]) -> RetrieverInfo:
    """Refuses a retriever that is not the one that an index was made with (`tokens_settings`); no model is loaded.

    Raises:
        DataError: One line.
    """
    from lavic.model.two_tower.retriever import RetrieverInfo

    folder = Path(recorded["bundle"])
    info = RetrieverInfo.read(folder)
    for name, digest in _digests(folder, info).items():
        if digest != recorded[name]:
            raise DataError(
                f"{folder}: the index was made with another retriever ({name} {str(recorded[name])[:12]}, now "
                f"{str(digest)[:12]}): put that one back, or make another index with this one"
            )
    return info


class TwoTowerEncoder:
    """A retriever, loaded.

    Args:
        recorded: By `tokens_settings`.
        tokens_per_batch: Of a forward pass.
        model: The base model, where it is loaded already; for queries alone.

    Raises:
        ConfigError: The base model is not found.
        DataError: The retriever is not there, or is not the one that the index was made with.
    """

    def __init__(
        self, recorded: Mapping[str, Any], *, tokens_per_batch: int = 8192, model: Bundle | None = None
    ) -> None:
        from lavic.distributed.context import DistributedContext
        from lavic.model.two_tower.folds import FINAL
        from lavic.model.two_tower.retriever import Retriever

        folder, info = Path(recorded["bundle"]), check_retriever(recorded)
        if model is None:
            self._retriever = Retriever.load(folder, DistributedContext.from_env().device())
        else:
            self._retriever = Retriever(model, folder, info)
        self._retriever.features.tokens_per_batch = tokens_per_batch
        self._heads = [FINAL, *range(recorded["heads"] - 1)]

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return len(self._heads) * self._retriever.info.dim

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of queries (see `query_text`): float32 [n, heads x dim]."""
        conversations = [_conversation(text) for text in texts]
        folds = self._retriever.folds(conversations)
        if missing := sum(fold not in self._heads for fold in folds):
            log.warning(
                "%d queries are conversations that the retriever was trained on, and the index has no heads that have "
                "not seen them: their lists are better than those of new conversations",
                missing,
            )
            folds = [fold if fold in self._heads else self._heads[0] for fold in folds]
        vectors = self._retriever.embed_queries(conversations, folds).numpy()
        placed = np.zeros((len(texts), len(self._heads), vectors.shape[1]), np.float32)
        placed[np.arange(len(texts)), [self._heads.index(fold) for fold in folds]] = vectors
        return placed.reshape(len(texts), -1)

    def items(self, store: ItemStore, ids: Sequence[str]) -> np.ndarray:
        """Vectors of items: float32 [n, heads x dim]; zeros for one that the store does not hold.

        Raises:
            DataError: The retriever was not trained on tokens of this store's making.
        """
        self._retriever.bundle.info.check_store(store)
        rows = [row for row, id in enumerate(ids) if id in store]
        vectors = np.zeros((len(ids), len(self._heads), self._retriever.info.dim), np.float32)
        for start in range(0, len(rows), _ITEMS):
            batch = rows[start : start + _ITEMS]
            embedded = self._retriever.embed_items(store, [ids[row] for row in batch], self._heads)
            vectors[batch] = embedded.transpose(0, 1).numpy()
        return vectors.reshape(len(ids), -1)


def _conversation(query: str) -> Conversation:
    turns = [text for text in query.split(TURN_END) if text.strip()]
    return Conversation(id="", turns=tuple(Turn("comment" if n else "seeker", text) for n, text in enumerate(turns)))
