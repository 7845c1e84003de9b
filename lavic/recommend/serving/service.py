"""What the server serves: a recommender and its photos, swapped whole when bundle, store or index are new."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from lavic.errors import DataError
from lavic.recommend.recommendation import CheckedQuery, Query, Recommendation
from lavic.recommend.recommender import Recommender
from lavic.recommend.serving.metrics import Metrics
from lavic.recommend.serving.photos import ItemPhotos

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where everything is loaded from, at the start and again for every change."""

    bundle: Path
    store: Path
    index: Path | None = None
    shards: tuple[str, ...] = ()
    """Sets of shards with the photos."""
    retrieved: int = 50
    """Candidates retrieved for a request that names none."""
    methods: tuple[str, ...] = ()
    """Methods of the index to search by; none: all that take text."""
    weights: tuple[float, ...] = ()
    """Of each method's ranks in the fusion."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    base: str | None = None
    """The base model, where it is not the recorded one."""
    tokens_per_item: int | None = None

    def load(self, before: Served | None = None) -> Served:
        """Loads what is in the folders now; the model is kept where the bundle is still the same.

        Raises:
            ConfigError, DataError: As `Recommender.load`; `before` is not changed.
        """
        load = Recommender.load if before is None else before.recommender.reloaded
        recommender = load(
            self.bundle,
            self.store,
            self.index,
            dtype=self.dtype,
            base=self.base,
            tokens_per_item=self.tokens_per_item,
            retrieved=self.retrieved,
            methods=self.methods,
            weights=self.weights,
        )
        store = recommender.store
        photos = None
        if self.shards:
            photos = ItemPhotos(self.shards, lambda item: store.key(item) if item in store else None)
        return Served(recommender, photos)


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
        """What tells bundle and store from others: digests of the language adapter and the store's manifest."""
        return str(self.recommender.ranker.bundle.info.language_adapter), self.recommender.store.manifest.digest[:16]


class Answers(Protocol):
    """Answers checked queries, in batches."""

    def __call__(self, recommender: Recommender, query: CheckedQuery) -> Awaitable[Recommendation]: ...


@dataclass
class Service:
    """The state of a server.

    Args:
        current: What is served now.
        answers: Answers queries in batches.
        metrics: Of the server.
        load: Loads what is in the folders now.
    """

    current: Served
    answers: Answers
    metrics: Metrics
    load: Callable[[Served], Served] | None = None
    ready: bool = False
    """Whether requests are taken: not before the start and not while it shuts down."""
    _reload: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    def __post_init__(self) -> None:
        self._announce()

    async def answer(self, query: Query) -> tuple[Served, Recommendation]:
        """Checks and answers a query; returns what answered it, too.

        Raises:
            ApiError, LavicError: It cannot be answered.
        """
        served = self.current
        return served, await self.answers(served.recommender, served.recommender.check(query))

    async def reload(self) -> bool:
        """Takes up what is in the folders now. Requests that came before are answered by what was served then.

        Returns:
            Whether it worked; if not, what was served is served on.
        """
        if self.load is None:
            return False
        async with self._reload:
            try:
                loaded = await asyncio.get_running_loop().run_in_executor(None, self.load, self.current)
            except Exception as error:
                log.error("not taken up: %s; the server goes on with what it has", error)
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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of a request."""

    turns: int = 200
    """Most turns of a conversation."""
    characters: int = 50_000
    """Most characters of a conversation."""
    candidates: int = 1000
    """Most candidates, and most excluded items."""
    k: int = 100
    """Most items of an answer."""


def check_limits(query: Query, limits: Limits) -> None:
    """Refuses a query that is larger than the server allows.

    Raises:
        DataError: Names the part.
    """
    form = query.conversation
    turns = 0 if isinstance(form, str) or not isinstance(form, Sequence) else len(form)
    for part, what, size, most in (
        (query.name, "turns", turns, limits.turns),
        ("candidates", "items", len(query.candidates or ()), limits.candidates),
        ("exclude", "items", len(query.exclude), limits.candidates),
        ("k", "items", query.k, limits.k),
        (query.name, "characters", _characters(form), limits.characters),
    ):
        if size > most:
            raise DataError(f"{part}: {size} {what}, the server takes {most} at most")


def _characters(form: Any) -> int:
    """Of all words in a conversation's form, which may be nested to any depth."""
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
