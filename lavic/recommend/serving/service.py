"""What the server serves: a recommender and its photos, replaced together when bundle, store or index change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lavic.errors import DataError
from lavic.recommend.recommendation import Query, Recommendation
from lavic.recommend.recommender import Recommender
from lavic.recommend.serve_settings import ServeSettings
from lavic.recommend.serving.batching.batcher import Batcher
from lavic.recommend.serving.metrics import Metrics
from lavic.recommend.serving.photos import ItemPhotos

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """One state of what is served. A request uses one from its beginning to its end."""

    recommender: Recommender
    photos: ItemPhotos | None = None

    def photo(self, item: str) -> str | None:
        """The path of an item's photo on the server; None where it has none."""
        return None if self.photos is None else self.photos.path(item)

    @property
    def names(self) -> tuple[str, str]:
        """What identifies bundle and store: digests of the language adapter and the store's manifest."""
        return str(self.recommender.ranker.bundle.info.language_adapter), self.recommender.store.manifest.digest[:16]


def load_served(settings: ServeSettings, before: Served | None = None) -> Served:
    """Loads what is in the folders now, and answers one request: no client waits for what a model's first pass sets up.

    Args:
        settings: Of the server.
        before: What is served so far: its model is kept if the bundle is the same.

    Raises:
        ConfigError, DataError: As `Recommender.load`, or the request failed; `before` is not changed.
    """
    recommender = Recommender.load(
        settings.bundle,
        settings.store,
        settings.index,
        dtype=settings.dtype,
        base=settings.model.name,
        tokens_per_item=settings.tokens_per_item,
        retrieved=settings.retrieved,
        methods=settings.methods,
        weights=settings.weights,
        reuse=None if before is None else before.recommender,
    )
    recommender.recommend("a product", list(recommender.store.ids[: recommender.list_size]))
    store = recommender.store
    photos = None
    if settings.shards:
        photos = ItemPhotos(settings.shards, lambda item: store.key(item) if item in store else None)
    return Served(recommender, photos)


@dataclass
class Service:
    """The state of a server."""

    settings: ServeSettings
    current: Served
    """What is served now."""
    batcher: Batcher
    metrics: Metrics
    ready: bool = False
    """Whether requests are accepted: not before the start and not during shutdown."""
    _reload: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    def __post_init__(self) -> None:
        self._announce()

    async def answer(self, query: Query) -> tuple[Served, Recommendation]:
        """Checks and answers a query; returns what answered it, too.

        Raises:
            ApiError, LavicError: It cannot be answered.
        """
        served = self.current
        return served, await self.batcher.answer(served.recommender, served.recommender.check(query))

    async def reload(self) -> bool:
        """Takes up what is in the folders now. Requests that came before are answered by what was served then.

        Returns:
            Whether it worked; if not, what was served is served on.
        """
        async with self._reload:
            try:
                loaded = await asyncio.get_running_loop().run_in_executor(
                    None, load_served, self.settings, self.current
                )
            except Exception as error:
                log.error("not taken up: %s; the server keeps what it has", error)
                self.metrics.reloads.labels("failed").inc()
                return False
            self.current = loaded
            self.metrics.reloads.labels("done").inc()
            self._announce()
            return True

    def _announce(self) -> None:
        bundle, store = self.current.names
        self.metrics.model.clear()
        self.metrics.model.labels(bundle, store).set(1)
        log.info("serving bundle %s, store %s (%d items)", bundle, store, len(self.current.recommender.store))


def check_limits(query: Query, settings: ServeSettings) -> None:
    """Refuses a query that is larger than the server allows.

    Raises:
        DataError: Names the part.
    """
    form = query.conversation
    turns = 0 if isinstance(form, str) or not isinstance(form, Sequence) else len(form)
    for part, unit, size, maximum in (
        (query.name, "turns", turns, settings.max_turns),
        ("candidates", "items", len(query.candidates or ()), settings.max_candidates),
        ("exclude", "items", len(query.exclude), settings.max_candidates),
        ("k", "items", query.k, settings.max_k),
        (query.name, "characters", _characters(form), settings.max_characters),
    ):
        if size > maximum:
            raise DataError(f"{part}: {size} {unit}, the server takes {maximum} at most")


def _characters(form: Any) -> int:
    """The characters of all texts in a conversation's form, which may be nested to any depth."""
    count, waiting = 0, [form]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
    return count
