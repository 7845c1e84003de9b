"""Makes shards in local processes, which start in tenths of a second.

A worker process makes one shard after the other. One pipe to it carries everything: the shard to make, its progress,
its result, and the worker's calls of the coordinator, which runs in a thread of the driver. A worker that dies is
replaced, and its shard is rebuilt. A worker whose driver dies exits at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import queue
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, cast

from lavic.errors import LavicError, first_line
from lavic.shards.cluster.progress import ShardReports
from lavic.shards.cluster.worker import Row, ShardJob, deferred_row, make_shard
from lavic.shards.cluster.worker_process import WorkerProcess, prepare
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.ratelimit.client import CoordinatorHandle
from lavic.shards.ratelimit.coordinator import Coordinator

log = logging.getLogger(__name__)

_REPLY_S = 2.0
"""Timeout of calls of the coordinator's thread."""
_ATTEMPTS = 3
"""Workers that may die while they make one shard."""


@contextmanager
def on_processes(rows: Sequence[Row], settings: CrawlSettings, owner: str) -> Iterator[ShardJob]:
    """Make shards in local processes, which end with the block; see `make_shard`."""
    prepare(__name__)
    pool = _Pool(rows, settings, owner)
    try:
        yield ShardJob(made=pool.made(), running=pool.reports.get, wait_reasons=pool.wait_reasons)
    finally:
        pool.close()


class _Pool:
    """The driver: an event loop in a thread, with the coordinator and a coroutine for each worker."""

    def __init__(self, rows: Sequence[Row], settings: CrawlSettings, owner: str) -> None:
        self.reports = ShardReports()
        self._settings, self._owner = settings, owner
        self._rows, self._todo = len(rows), deque(rows)
        self._coordinator = Coordinator(settings.fetch.limits)
        self._made: queue.SimpleQueue[Row | Exception] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="coordinator", daemon=True)
        self._ready = threading.Event()
        self._thread.start()
        self._ready.wait()

    def made(self) -> Iterator[Row]:
        for _ in range(self._rows):
            row = self._made.get()
            if isinstance(row, Exception):
                raise row
            yield row

    def wait_reasons(self) -> Mapping[str, str]:
        try:
            return asyncio.run_coroutine_threadsafe(self._coordinator.wait_reasons(), self._loop).result(_REPLY_S)
        except FutureTimeoutError:
            return {}

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        cpus = self._settings.ray.cpus or len(os.sched_getaffinity(0))
        count = min(self._settings.ray.workers or cpus, self._rows)
        tasks = [asyncio.create_task(self._feed()) for _ in range(count)]
        try:
            await self._over.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(self) -> None:
        """Give shards to a worker, and to another one if it dies."""
        worker: _Worker | None = None
        try:
            while self._todo:
                row = self._todo.popleft()
                if not self._todo:
                    # There is nothing else to do.
                    row = {**row, "defer_after": math.inf}
                result = None
                for _ in range(_ATTEMPTS):
                    worker = worker or _Worker(self._coordinator, self.reports, self._settings, self._owner)
                    result = await worker.make(row)
                    if result is not None:
                        break
                    if worker.caller:
                        # Its connections are free at once, not only after the timeout.
                        await self._coordinator.remove_worker(worker.caller)
                    exit_reason, worker = worker.stop(), None
                    log.warning("%s: its worker died (%s); another one rebuilds it", row["shard"], exit_reason)
                else:
                    raise LavicError(
                        f"{row['shard']}: {_ATTEMPTS} workers died while they made it, the last with {exit_reason}; if "
                        "memory is short, use fewer --ray.workers or a lower --fetch.concurrency"
                    )
                if result["left"]:
                    self._todo.append(deferred_row(row))
                else:
                    self._made.put(result)
        except Exception as error:
            self._made.put(error)
        finally:
            if worker is not None:
                worker.stop()


class _Worker:
    """The driver's side of a worker process."""

    def __init__(self, coordinator: Coordinator, reports: ShardReports, settings: CrawlSettings, owner: str) -> None:
        self._coordinator, self._reports = coordinator, reports
        self.caller = ""
        """The name that it has at the coordinator now."""
        self._loop = asyncio.get_running_loop()
        self._process = WorkerProcess(_work, settings, owner)
        self._pipe = self._process.pipe
        self._made: asyncio.Queue[Row | Exception | None] = asyncio.Queue()
        self._calls: set[asyncio.Task[None]] = set()
        self._loop.add_reader(self._pipe.fileno(), self._read)

    async def make(self, row: Row) -> Row | None:
        """Make a shard; None if the worker dies."""
        with contextlib.suppress(OSError):
            self._pipe.send(row)
        result = await self._made.get()
        if isinstance(result, Exception):
            raise result
        return result

    def stop(self) -> str:
        """Kill the process; returns how it ended."""
        self._loop.remove_reader(self._pipe.fileno())
        for call in self._calls:
            call.cancel()
        end = self._process.stop()
        self._pipe.close()
        return end

    def _read(self) -> None:
        try:
            kind, *payload = self._pipe.recv()
        except (EOFError, OSError):
            self._loop.remove_reader(self._pipe.fileno())
            self._made.put_nowait(None)
            return
        if kind == "call":
            call = self._loop.create_task(self._reply(*payload))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        elif kind == "report":
            self._reports.put(*payload)
        else:
            self._made.put_nowait(payload[0] if kind == "made" else RuntimeError(f"a worker failed\n{payload[0]}"))

    async def _reply(self, number: int, method: str, args: tuple[Any, ...]) -> None:
        if method in ("sync", "wait_for_change"):
            self.caller = args[0]
        reply: tuple[int, Any, str | None]
        try:
            reply = (number, await getattr(self._coordinator, method)(*args), None)
        except Exception as error:
            reply = (number, None, first_line(error))
        with contextlib.suppress(OSError):
            self._pipe.send(reply)


class _PipeCoordinator:
    """The worker's side of the coordinator: each method of `CoordinatorHandle` is a call over the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._numbers = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any) -> Any:
            loop = asyncio.get_running_loop()
            if loop is not self._loop:
                # Each shard has its own loop.
                self._loop, self._calls = loop, {}
                loop.add_reader(self._pipe.fileno(), self._read)
            number = next(self._numbers)
            future = self._calls[number] = loop.create_future()
            self._pipe.send(("call", number, method, args))
            try:
                return await future
            finally:
                self._calls.pop(number, None)

        if method.startswith("_"):
            raise AttributeError(method)
        return call

    def _read(self) -> None:
        try:
            number, value, error = self._pipe.recv()
        except (EOFError, OSError):
            os._exit(1)  # The driver is gone.
        future = self._calls.get(number)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(RuntimeError(error))


def _work(pipe: Connection, settings: CrawlSettings, owner: str) -> None:
    """The worker process."""
    coordinator = cast(CoordinatorHandle, _PipeCoordinator(pipe))
    while True:
        try:
            row = pipe.recv()
        except EOFError:
            return
        if not isinstance(row, dict):
            continue  # The reply to a call that the last shard has cancelled.

        def report(counts: Mapping[str, int], number: int = row["number"]) -> None:
            pipe.send(("report", number, dict(counts)))

        try:
            pipe.send(("made", make_shard(row, settings, owner, coordinator, report)))
        except BrokenPipeError:
            return
        except Exception:
            pipe.send(("failed", traceback.format_exc()))
