"""Dynamic batching: requests that wait together are answered by one call of the recommender."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from lavic.errors import LavicError
from lavic.recommend.recommender import CheckedQuery, Recommendation, Recommender
from lavic.recommend.serving.errors import ApiError, from_lavic_error
from lavic.recommend.serving.metrics import Metrics

log = logging.getLogger(__name__)

_FIRST_GUESS_S = 0.05
"""Seconds of a prompt, before the first batch was measured."""
_WAIT_OF_DEADLINE = 0.95
"""Share of the deadline after which an answer is no longer waited for; the rest is for sending the refusal."""
_MOST_OF_DEADLINE = 0.8
"""Share of the deadline in which a request must be expected to be answered when it is taken into the queue."""
_BATCH_OF_DEADLINE = 0.25
"""Share of the deadline that a batch may be expected to take."""
_SLOWER, _FASTER = 0.5, 0.2
"""Share of the last batch in the running mean of a prompt's seconds, by whether it was slower or faster than the mean:
a mean that is too low costs answers that come too late, one that is too high only a few refusals."""


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
    prompts: int
    """About how many prompts it takes."""
    until: float
    """When it is no longer waited for, by the event loop's clock."""
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
        self._prompt_s = _FIRST_GUESS_S
        self._measured = False
        self._running = 0
        """Prompts of the batch that is computed now."""
        self._began = 0.0
        """When it was begun, by the event loop's clock."""

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
        prompts = recommender.prompts(query)
        if len(self._waiting) >= settings.queue or self._too_late(prompts):
            self.metrics.dropped.labels("queue_full").inc()
            raise too_many(self._retry())
        wait_s = _WAIT_OF_DEADLINE * settings.deadline
        waiting = _Waiting(recommender, query, prompts, loop.time() + wait_s, loop.create_future())
        self._waiting.append(waiting)
        self.metrics.waiting.set(len(self._waiting))
        self._arrived.set()
        try:
            await asyncio.wait({waiting.answer}, timeout=wait_s)
            if waiting.answer.done():
                return waiting.answer.result()
            raise self._late()
        except asyncio.CancelledError:
            self.metrics.dropped.labels("client_left").inc()
            raise
        finally:
            if not waiting.answer.cancel() and not waiting.answer.cancelled():
                waiting.answer.exception()  # a client that has left does not ask for it
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiting)
            self.metrics.waiting.set(len(self._waiting))

    def _late(self) -> ApiError:
        """The refusal of a request that is not answered in time."""
        self.metrics.dropped.labels("deadline").inc()
        return late(self.settings, self._retry())

    def _ahead_s(self) -> float:
        """Seconds that everything which was taken is expected to take yet."""
        seconds = self._prompts() * self._prompt_s
        if self._running:
            # A batch that is overdue is expected to take as long again as it is overdue.
            spent = asyncio.get_running_loop().time() - self._began
            seconds += abs(self._running * self._prompt_s - spent)
        return seconds

    def _too_late(self, prompts: int) -> bool:
        """Whether a request that comes now is expected to be answered too late: it would only delay the others.

        An idle server always tries, so that a mean that is far too high does not stay so.
        """
        if not self._waiting and not self._running:
            return False
        return self._ahead_s() + prompts * self._prompt_s > _MOST_OF_DEADLINE * self.settings.deadline

    def _retry(self) -> int:
        """Seconds until what was taken should be answered."""
        return max(1, math.ceil(min(self._ahead_s(), self.settings.deadline)))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather()
            if batch := self._take():
                prompts = sum(waiting.prompts for waiting in batch)
                self._began, self._running = loop.time(), prompts
                try:
                    answers = await loop.run_in_executor(self._thread, _answer, batch)
                except Exception:  # the next batch must be answered all the same
                    log.exception("a batch of %d requests failed", len(batch))
                    answers = [ApiError(500, "the server failed; its log says why") for _ in batch]
                seconds, self._running = loop.time() - self._began, 0
                self._measure(seconds / prompts)
                self.metrics.batch_size.observe(len(batch))
                self.metrics.batch_seconds.observe(seconds)
                for waiting, answer in zip(batch, answers, strict=True):
                    if waiting.answer.done():  # cancelled: its client has left, or its deadline has passed
                        continue
                    if loop.time() > waiting.until:
                        waiting.answer.set_exception(self._late())
                    elif isinstance(answer, Exception):
                        waiting.answer.set_exception(answer)
                    else:
                        waiting.answer.set_result(answer)

    def _measure(self, prompt_s: float) -> None:
        """Takes the seconds of a prompt in the last batch into their running mean."""
        share = _SLOWER if prompt_s > self._prompt_s else _FASTER
        self._prompt_s += (share if self._measured else 1.0) * (prompt_s - self._prompt_s)
        self._measured = True

    async def _gather(self) -> None:
        """Waits for more requests, for at most `batch_ms`, or until a batch is full."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.settings.batch_ms / 1000
        while (left := until - loop.time()) > 0 and self._prompts() < self.settings.batch_size:
            self._arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _prompts(self) -> int:
        """Of all requests that wait."""
        return sum(waiting.prompts for waiting in self._waiting)

    def _take(self) -> list[_Waiting]:
        """The requests of the next batch, in the order in which they came; all of one recommender.

        All of a batch are answered when its last prompt is done, so it is kept so short that its oldest request is
        answered in time. What cannot be answered in time any more is refused now.
        """
        batch: list[_Waiting] = []
        prompts = 0
        now = asyncio.get_running_loop().time()
        while self._waiting:
            waiting = self._waiting[0]
            if waiting.answer.done():
                self._waiting.popleft()
                continue
            expected = now + waiting.prompts * self._prompt_s
            if now > waiting.until or (len(self._waiting) > 1 and expected > waiting.until):
                self._waiting.popleft()
                waiting.answer.set_exception(self._late())
                continue
            prompts += waiting.prompts
            if batch and (
                prompts > self.settings.batch_size
                or prompts * self._prompt_s > min(self._longest_s, batch[0].until - now)
                or waiting.recommender is not batch[0].recommender
            ):
                break
            batch.append(self._waiting.popleft())
            if not self._measured:
                break  # nobody knows yet how long a prompt takes
        self.metrics.waiting.set(len(self._waiting))
        return batch

    @property
    def _longest_s(self) -> float:
        """Seconds that a batch may be expected to take."""
        return _BATCH_OF_DEADLINE * self.settings.deadline


def too_many(seconds: int) -> ApiError:
    """The answer to a request that would wait too long; `seconds` is when to come back."""
    return ApiError(429, "too many requests wait already; try again later", headers={"Retry-After": str(seconds)})


def late(settings: BatchSettings, seconds: int) -> ApiError:
    """The answer to a request whose deadline has passed; `seconds` is when to come back."""
    message = f"not answered within {settings.deadline:g} s; try again later"
    return ApiError(503, message, headers={"Retry-After": str(seconds)})


def _answer(batch: Sequence[_Waiting]) -> list[Recommendation | ApiError]:
    """Answers a batch; if it fails as a whole, each request by itself, so that one does not spoil the others'."""
    recommender, queries = batch[0].recommender, [waiting.query for waiting in batch]
    return answer_each(recommender, queries, lambda row: not batch[row].answer.done())


def answer_each(
    recommender: Recommender, queries: Sequence[CheckedQuery], wanted: Callable[[int], bool] = lambda row: True
) -> list[Recommendation | ApiError]:
    """The answer, or the error answer, to each query.

    Args:
        recommender: Answers them.
        queries: By its `check`.
        wanted: Whether somebody still waits for a query's answer, by its place.
    """
    try:
        answers = recommender.answer(queries)
    except Exception as error:
        if len(queries) > 1:
            log.warning("a batch of %d requests failed (%s); each is tried by itself", len(queries), error)
            left = ApiError(499, "nobody waits for the answer")
            return [answer_each(recommender, [query])[0] if wanted(row) else left for row, query in enumerate(queries)]
        if isinstance(error, LavicError):
            log.error("a request failed: %s", error)
            return [ApiError(503, "the item store or index cannot be read; the server's log says why")]
        log.exception("a request failed")
        return [ApiError(500, "the server failed; its log says why")]
    return [from_lavic_error(answer) if isinstance(answer, LavicError) else answer for answer in answers]
