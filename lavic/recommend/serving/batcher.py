"""Dynamic batching: requests that wait together are answered by one call of the recommender."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from lavic.errors import LavicError
from lavic.recommend.recommender import CheckedQuery, Recommendation, Recommender
from lavic.recommend.serving.errors import ApiError, from_lavic_error
from lavic.recommend.serving.metrics import Metrics

log = logging.getLogger(__name__)

_FIRST_GUESS_S = 0.05
"""Seconds of a request, before the first was answered."""
_MOST_OF_DEADLINE = 0.8
"""Share of the deadline that a request may be expected to wait when it is taken into the queue."""
_BATCH_OF_DEADLINE = 0.25
"""Share of the deadline that a batch may be expected to take."""
_SMOOTHING = 0.2
"""Share of the last batch in the running mean of a request's seconds."""


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How requests are put together."""

    batch_size: int = 64
    """Most prompts of a batch; a list that is ranked in groups counts as several. One request is always taken."""
    batch_ms: float = 5.0
    """Longest time that a request waits for others while the model is idle, milliseconds."""
    queue: int = 256
    """Most requests that wait; further ones are answered with 429."""
    deadline: float = 30.0
    """Seconds after which a request is answered with 503."""


@dataclass(eq=False)
class _Waiting:
    """A request that waits for its answer."""

    recommender: Recommender
    """The one that was served when the request came."""
    query: CheckedQuery
    until: float
    """Its deadline, of the event loop's clock."""
    answer: asyncio.Future[Recommendation] = field(repr=False)


class Batcher:
    """Answers queries in batches, in a thread of its own, first come, first served.

    While a batch is computed, requests gather for the next one. What has passed its deadline, or whose client has left,
    is taken out before it costs anything.
    """

    def __init__(self, settings: BatchSettings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lavic-model")
        self._task: asyncio.Task[None] | None = None
        self._request_s = _FIRST_GUESS_S
        self._running = 0
        """Requests of the batch that is computed now."""

    def start(self) -> None:
        """Begins to answer; called in the event loop."""
        self._task = asyncio.create_task(self._run(), name="lavic-batcher")

    @property
    def running(self) -> bool:
        """Whether requests are answered."""
        return self._task is not None and not self._task.done()

    async def stop(self) -> None:
        """Ends; what still waits is answered with 503."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.answer.done():
                waiting.answer.set_exception(ApiError(503, "the server shuts down"))
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def answer(self, recommender: Recommender, query: CheckedQuery) -> Recommendation:
        """The answer to one query. Cancelled, it is taken out of the queue.

        Raises:
            ApiError: 429, too many wait; 503, the deadline has passed; 422, it cannot be answered; 500, it failed.
        """
        settings, loop = self.settings, asyncio.get_running_loop()
        if len(self._waiting) >= settings.queue or self._too_late():
            self.metrics.dropped.labels("queue_full").inc()
            raise too_many(settings, self._retry())
        waiting = _Waiting(recommender, query, loop.time() + settings.deadline, loop.create_future())
        self._waiting.append(waiting)
        self.metrics.waiting.set(len(self._waiting))
        self._arrived.set()
        try:
            await asyncio.wait({waiting.answer}, timeout=settings.deadline)
            if waiting.answer.done():
                return waiting.answer.result()
            self.metrics.dropped.labels("deadline").inc()
            raise late(settings, self._retry())
        except asyncio.CancelledError:
            self.metrics.dropped.labels("client_left").inc()
            raise
        finally:
            waiting.answer.cancel()
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiting)
            self.metrics.waiting.set(len(self._waiting))

    def _too_late(self) -> bool:
        """Whether a request that comes now is expected to be answered too late: it would only delay the others."""
        ahead = len(self._waiting) + self._running
        return ahead > 0 and (ahead + 1) * self._request_s > _MOST_OF_DEADLINE * self.settings.deadline

    def _retry(self) -> int:
        """Seconds until what waits now should be answered."""
        return max(1, math.ceil(len(self._waiting) * self._request_s))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather()
            if batch := self._take():
                began, self._running = time.perf_counter(), len(batch)
                try:
                    answers = await loop.run_in_executor(self._thread, _answer, batch)
                except Exception:  # the next batch must be answered all the same
                    log.exception("a batch of %d requests failed", len(batch))
                    answers = [ApiError(500, "the server failed; its log says why") for _ in batch]
                seconds, self._running = time.perf_counter() - began, 0
                self.metrics.batch_size.observe(len(batch))
                self.metrics.batch_seconds.observe(seconds)
                self._request_s += _SMOOTHING * (seconds / len(batch) - self._request_s)
                for waiting, answer in zip(batch, answers, strict=True):
                    if waiting.answer.done():  # cancelled: its client has left, or its deadline has passed
                        continue
                    if isinstance(answer, Exception):
                        waiting.answer.set_exception(answer)
                    else:
                        waiting.answer.set_result(answer)

    async def _gather(self) -> None:
        """Waits for more requests, for at most `batch_ms`, or until a batch is full."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.settings.batch_ms / 1000
        while (left := until - loop.time()) > 0 and self._prompts() < self.settings.batch_size:
            self._arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _prompts(self) -> int:
        return sum(waiting.recommender.prompts(waiting.query) for waiting in self._waiting)

    def _take(self) -> list[_Waiting]:
        """The requests of the next batch, in the order in which they came; all of one recommender."""
        batch: list[_Waiting] = []
        prompts = 0
        now = asyncio.get_running_loop().time()
        while self._waiting:
            waiting = self._waiting[0]
            expected = (len(batch) + 1) * self._request_s
            if waiting.answer.done():
                self._waiting.popleft()
                continue
            if batch and expected > _BATCH_OF_DEADLINE * self.settings.deadline:
                break
            if now + self._request_s > waiting.until and len(self._waiting) > 1:
                # It would be computed for nobody; its deadline answers it.
                self._waiting.popleft()
                continue
            prompts += waiting.recommender.prompts(waiting.query)
            if batch and (prompts > self.settings.batch_size or waiting.recommender is not batch[0].recommender):
                break
            batch.append(self._waiting.popleft())
        self.metrics.waiting.set(len(self._waiting))
        return batch


def too_many(settings: BatchSettings, seconds: int) -> ApiError:
    """The answer to a request that finds the queue full; `seconds` is when to come back."""
    message = f"{settings.queue} requests wait already; try again later"
    return ApiError(429, message, headers={"Retry-After": str(seconds)})


def late(settings: BatchSettings, seconds: int) -> ApiError:
    """The answer to a request whose deadline has passed; `seconds` is when to come back."""
    message = f"not answered within {settings.deadline:g} s; try again later"
    return ApiError(503, message, headers={"Retry-After": str(seconds)})


def _answer(batch: Sequence[_Waiting]) -> list[Recommendation | ApiError]:
    """Answers a batch; if it fails as a whole, each request by itself, so that one does not spoil the others'."""
    recommender, queries = batch[0].recommender, [waiting.query for waiting in batch]
    return answer_each(recommender, queries)


def answer_each(recommender: Recommender, queries: Sequence[CheckedQuery]) -> list[Recommendation | ApiError]:
    """The answer, or the error answer, to each query.

    Args:
        recommender: Answers them.
        queries: By its `check`.
    """
    try:
        answers = recommender.answer(queries)
    except Exception as error:
        if len(queries) > 1:
            log.warning("a batch of %d requests failed (%s); each is tried by itself", len(queries), error)
            return [answer for query in queries for answer in answer_each(recommender, [query])]
        if isinstance(error, LavicError):
            log.error("a request failed: %s", error)
            return [ApiError(503, "the item store or index cannot be read; the server's log says why")]
        log.exception("a request failed")
        return [ApiError(500, "the server failed; its log says why")]
    return [from_lavic_error(answer) if isinstance(answer, LavicError) else answer for answer in answers]
