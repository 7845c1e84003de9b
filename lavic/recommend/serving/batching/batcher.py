"""The batches of a server: requests gather while the one before is computed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from lavic.errors import LavicError
from lavic.recommend.recommendation import CheckedQuery, Recommendation
from lavic.recommend.recommender import Recommender
from lavic.recommend.serve_settings import ServeSettings
from lavic.recommend.serving.batching.admission import Admission
from lavic.recommend.serving.errors import ApiError, from_lavic_error
from lavic.recommend.serving.metrics import Metrics

log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 2e-4
"""The interpreter's switch interval while the server runs. PyTorch releases the GIL in each operation and must acquire
it again. With Python's default of 5 ms, an event loop that is busy with refusals makes a forward pass take seconds."""


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
    """Answers queries in batches, in a separate thread, first come, first served.

    While a batch is computed, requests gather for the next one. What has passed its deadline, or whose client has left,
    is taken out before it costs anything.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self.settings, self.metrics, self.admission = settings, metrics, Admission(settings)
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lavic-model")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to answer; called in the event loop. Sets the interpreter's switch interval."""
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
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
        loop, wait_s = asyncio.get_running_loop(), self.admission.wait_s
        prompts = recommender.prompts(query)
        if not self.admission.admits(prompts, len(self._waiting), self._prompts()):
            self.metrics.dropped.labels("queue_full").inc()
            await asyncio.sleep(self.admission.refusal_s)
            raise self.admission.too_many(self._prompts())
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
                waiting.answer.exception()  # a client that has left does not retrieve it
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiting)
            self.metrics.waiting.set(len(self._waiting))

    def _late(self) -> ApiError:
        """The refusal of a request that is not answered in time."""
        self.metrics.dropped.labels("deadline").inc()
        return self.admission.late(self._prompts())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather()
            if batch := self._take():
                self.admission.begin(sum(waiting.prompts for waiting in batch))
                try:
                    answers = await loop.run_in_executor(self._thread, _answer, batch)
                except Exception:  # the next batch must be answered all the same
                    log.exception("a batch of %d requests failed", len(batch))
                    answers = [ApiError(500, "the server failed; its log says why") for _ in batch]
                self.metrics.batch_seconds.observe(self.admission.end())
                self.metrics.batch_size.observe(len(batch))
                for waiting, answer in zip(batch, answers, strict=True):
                    if waiting.answer.done():  # cancelled: its client has left, or its deadline has passed
                        continue
                    if loop.time() > waiting.until:
                        waiting.answer.set_exception(self._late())
                    elif isinstance(answer, Exception):
                        waiting.answer.set_exception(answer)
                    else:
                        waiting.answer.set_result(answer)

    async def _gather(self) -> None:
        """Waits for more requests, for at most `batch_ms`, or until a batch is full."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.batch_ms / 1000
        while (remaining_s := deadline - loop.time()) > 0 and self._prompts() < self.settings.batch_size:
            self._arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), remaining_s)

    def _prompts(self) -> int:
        """The prompts of all requests that wait."""
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
            expected = now + waiting.prompts * self.admission.prompt_s
            if now > waiting.until or (len(self._waiting) > 1 and expected > waiting.until):
                self._waiting.popleft()
                waiting.answer.set_exception(self._late())
                continue
            prompts += waiting.prompts
            if batch and (
                prompts > self.settings.batch_size
                or prompts * self.admission.prompt_s > min(self.admission.longest_s, batch[0].until - now)
                or waiting.recommender is not batch[0].recommender
            ):
                break
            batch.append(self._waiting.popleft())
            if not self.admission.measured:
                break  # nobody knows yet how long a prompt takes
        self.metrics.waiting.set(len(self._waiting))
        return batch


def _answer(batch: Sequence[_Waiting]) -> list[Recommendation | ApiError]:
    """The answer, or the error answer, to each request of a batch; if the batch fails, each is tried by itself."""
    try:
        answers = batch[0].recommender.answer([waiting.query for waiting in batch])
    except Exception as error:
        if len(batch) > 1:
            log.warning("a batch of %d requests failed (%s); each is tried by itself", len(batch), error)
            abandoned = ApiError(499, "nobody waits for the answer")
            return [abandoned if waiting.answer.done() else _answer([waiting])[0] for waiting in batch]
        if isinstance(error, LavicError):
            log.error("a request failed: %s", error)
            return [ApiError(503, "the item store or index cannot be read; the server's log says why")]
        log.exception("a request failed")
        return [ApiError(500, "the server failed; its log says why")]
    return [from_lavic_error(answer) if isinstance(answer, LavicError) else answer for answer in answers]
