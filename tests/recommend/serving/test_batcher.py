"""The batcher under load, with a recommender and a clock that the test controls."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from lavic.errors import LavicError
from lavic.recommend.serve_settings import ServeSettings
from lavic.recommend.serving.batching.admission import Admission
from lavic.recommend.serving.batching.batcher import Batcher
from lavic.recommend.serving.errors import ApiError
from lavic.recommend.serving.metrics import Metrics

DEADLINE = 1000.0


def serve_settings(**settings: Any) -> ServeSettings:
    return ServeSettings(bundle=Path("bundle"), store=Path("store"), **settings)


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock can be advanced."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


class GatedRecommender:
    """Answers a query with itself; each batch waits until the test opens the gate."""

    def __init__(self, *, fails: bool = False) -> None:
        self.gate = threading.Semaphore(0)
        self.batches: list[list[Any]] = []
        """All computed batches."""
        self.fails = fails
        """Whether batches of several queries fail."""

    def prompts(self, query: Any) -> int:
        return int(query) if isinstance(query, int) else 1

    def answer(self, queries: list[Any]) -> list[Any]:
        self.batches.append(list(queries))
        self.gate.acquire()
        if self.fails and len(queries) > 1:
            raise LavicError("the batch fails")
        return list(queries)


class Server:
    """A batcher and its clients."""

    def __init__(self, recommender: GatedRecommender, **settings: Any) -> None:
        self.recommender: Any = recommender
        self.batcher = Batcher(serve_settings(batch_ms=0.0, **{"deadline": DEADLINE, **settings}), Metrics())
        self.batcher.start()

    def ask(self, query: Any) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self.batcher.answer(self.recommender, query))

    async def begun(self, batches: int) -> None:
        """Waits until the model computes its n-th batch."""
        while len(self.recommender.batches) < batches:
            await asyncio.sleep(0)

    async def idle(self) -> None:
        """Waits until nothing is computed."""
        while self.batcher.admission.running:
            await asyncio.sleep(0)

    async def warm(self) -> None:
        """Answers a first query, after which batches have several."""
        self.recommender.gate.release()
        await self.ask("first")
        self.batcher.admission.prompt_s = 1.0


def status(task: asyncio.Task[Any]) -> int:
    error = task.exception()
    if error is None:
        return 200
    assert isinstance(error, ApiError)
    return error.status


def run(test: Coroutine[Any, Any, None]) -> None:
    loop = Loop()
    try:
        loop.run_until_complete(asyncio.wait_for(test, 10 * DEADLINE))
    finally:
        loop.close()


def test_requests_during_a_batch_wait_up_to_the_queue_size():
    async def test() -> None:
        server = Server(GatedRecommender(), queue=4)
        first = server.ask("a")
        await server.begun(1)
        clients = [server.ask("b") for _ in range(40)]
        refused = clients[4:]
        began = asyncio.get_running_loop().time()
        await asyncio.wait(refused)  # the model still computes: the event loop does not wait for it
        # not at once: clients that retry would take CPU time from the model
        assert asyncio.get_running_loop().time() - began >= server.batcher.admission.refusal_s
        assert {status(task) for task in refused} == {429} and not any(task.done() for task in (first, *clients[:4]))
        server.recommender.gate.release(2)
        await asyncio.wait({first, *clients[:4]})
        assert {status(task) for task in (first, *clients[:4])} == {200}
        assert server.recommender.batches == [["a"], ["b"] * 4]
        await server.batcher.stop()

    run(test())


def test_waiting_requests_are_refused_at_the_deadline():
    async def test() -> None:
        server, loop = Server(GatedRecommender()), asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        running = server.ask("running")
        await server.begun(1)
        clients = [server.ask("waits") for _ in range(50)]
        await asyncio.sleep(0)
        loop.ahead = DEADLINE
        await asyncio.wait({running, *clients})  # although the model has not answered
        assert {status(task) for task in (running, *clients)} == {503}
        meanwhile = server.ask("meanwhile")
        await asyncio.wait({meanwhile})
        assert status(meanwhile) == 429  # the batch is far overdue
        server.recommender.gate.release(2)
        await server.idle()
        retried = server.ask("again")  # an idle server accepts requests after a slow batch
        await asyncio.wait({retried})
        assert status(retried) == 200 and server.recommender.batches == [["running"], ["again"]]
        await server.batcher.stop()

    run(test())


def test_an_answer_after_the_deadline_is_refused():
    async def test() -> None:
        server, loop = Server(GatedRecommender()), asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        late = server.ask("late")
        await server.begun(1)
        loop.ahead = DEADLINE
        server.recommender.gate.release()
        await asyncio.wait({late})
        assert status(late) == 503
        await server.batcher.stop()

    run(test())


def test_the_queue_counts_prompts():
    """Two requests of 300 prompts of a second each are accepted, and a request of one prompt beside them."""

    async def test() -> None:
        server = Server(GatedRecommender(), batch_size=64)
        await server.warm()
        clients = [server.ask(300) for _ in range(5)] + [server.ask("short")]
        await server.begun(2)
        await asyncio.wait(clients[2:5])
        assert [status(task) for task in clients[2:5]] == [429] * 3
        server.recommender.gate.release(3)
        await asyncio.wait({*clients[:2], clients[5]})
        assert [status(clients[row]) for row in (0, 1, 5)] == [200] * 3
        assert server.recommender.batches[1:] == [[300], [300], ["short"]]
        await server.batcher.stop()

    run(test())


def test_batch_size_is_limited_by_the_deadline():
    async def test() -> None:
        server = Server(GatedRecommender(), batch_size=1000, queue=1000)
        await server.warm()
        clients = [server.ask("short") for _ in range(400)]
        await server.begun(2)
        assert len(server.recommender.batches[1]) == DEADLINE / 4
        server.recommender.gate.release(len(clients))
        await asyncio.wait(clients)
        assert {status(task) for task in clients} == {200}
        await server.batcher.stop()

    run(test())


def test_requests_expected_to_be_late_are_not_computed():
    """The previous batch took longer than expected; requests that would be late are refused when it ends."""

    async def test() -> None:
        server, loop = Server(GatedRecommender()), asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        await server.warm()
        running = server.ask("running")
        await server.begun(2)
        long, short = server.ask(200), server.ask("short")
        await asyncio.sleep(0)
        loop.ahead = 0.9 * DEADLINE
        server.batcher.admission.measure = lambda prompt_s: None  # type: ignore[method-assign]
        server.recommender.gate.release(2)
        await asyncio.wait({running, long, short})
        assert (status(running), status(long), status(short)) == (200, 503, 200)
        assert server.recommender.batches == [["first"], ["running"], ["short"]]
        await server.batcher.stop()

    run(test())


def test_a_cancelled_request_does_not_delay_its_batch():
    async def test() -> None:
        server = Server(GatedRecommender())
        await server.warm()
        cancelled, stays = server.ask("left"), server.ask("stays")
        await server.begun(2)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        assert cancelled.cancelled()
        server.recommender.gate.release(2)
        await asyncio.wait({stays, later := server.ask("again")})
        assert status(stays) == status(later) == 200
        await server.batcher.stop()

    run(test())


def test_a_failed_batch_is_not_retried_for_cancelled_requests():
    async def test() -> None:
        server = Server(GatedRecommender(fails=True))
        await server.warm()
        clients = [server.ask("left"), server.ask("stays")]
        await server.begun(2)
        clients[0].cancel()
        await asyncio.wait({clients[0]})
        server.recommender.gate.release(3)
        await asyncio.wait({clients[1]})
        assert status(clients[1]) == 200
        assert server.recommender.batches == [["first"], ["left", "stays"], ["stays"]]
        await server.batcher.stop()

    run(test())


@pytest.mark.parametrize("measured, mean", [((10.0,), 10.0), ((1.0, 3.0), 2.0), ((2.0, 1.0), 1.8)])
def test_the_mean_rises_faster_than_it_falls(measured: tuple[float, ...], mean: float):
    admission = Admission(serve_settings())
    for prompt_s in measured:
        admission.measure(prompt_s)
    assert admission.prompt_s == pytest.approx(mean)


@pytest.mark.parametrize("deadline, wait, refusal", [(30.0, 28.5, 0.1), (2.0, 1.6, 0.1), (0.5, 0.375, 0.05)])
def test_the_deadline_leaves_time_to_send_a_refusal(deadline: float, wait: float, refusal: float):
    admission = Admission(serve_settings(deadline=deadline))
    assert (admission.wait_s, admission.refusal_s) == pytest.approx((wait, refusal))


def test_the_thread_switch_interval_is_short():
    async def test() -> None:
        server = Server(GatedRecommender())
        assert sys.getswitchinterval() <= 2e-4
        await server.batcher.stop()

    run(test())
