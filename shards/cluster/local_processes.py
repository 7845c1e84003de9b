"""Shards made by processes of this machine: what a small crawl needs, ready in tenths of a second.

A worker process makes one shard after the other. One pipe to it carries everything: which shard to make, its progress,
its result, and the worker's calls of the hosts' broker, which runs in a thread of the driver. A worker that dies is
replaced, and its shard is made again. A worker whose driver dies exits at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, cast

from lavic.errors import LavicError, first_line
from lavic.shards.cluster.progress import ShardReports
from lavic.shards.cluster.worker import Job, Row, later, make_shard
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.ratelimit.client import Office
from lavic.shards.ratelimit.coordinator import Broker

log = logging.getLogger(__name__)

_ANSWER_S = 2.0
"""Seconds in which the thread of the broker answers."""
_ATTEMPTS = 3
"""Workers that may die over one shard."""


def prepare() -> None:
    """Begin to load what workers need, beside this process: they are forked from there."""
    multiprocessing.set_forkserver_preload([__name__])
    forkserver.ensure_running()


@contextmanager
def on_processes(rows: Sequence[Row], settings: CrawlSettings, owner: str) -> Iterator[Job]:
    """Have shards made by local processes; see `make_shard`. On the way out the workers are ended."""
    prepare()
    pool = _Pool(rows, settings, owner)
    try:
        yield Job(made=pool.made(), running=pool.reports.get, waits=pool.waits)
    finally:
        pool.close()


class _Pool:
    """The driver's side: an event loop in a thread, with the broker and a coroutine for each worker."""

    def __init__(self, rows: Sequence[Row], settings: CrawlSettings, owner: str) -> None:
        self.reports = ShardReports()
        self._settings, self._owner = settings, owner
        self._rows, self._todo = len(rows), deque(rows)
        self._broker = Broker(settings.fetch.limits)
        self._made: queue.SimpleQueue[Row | Exception] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="broker", daemon=True)
        self._ready = threading.Event()
        self._thread.start()
        self._ready.wait()

    def made(self) -> Iterator[Row]:
        for _ in range(self._rows):
            row = self._made.get()
            if isinstance(row, Exception):
                raise row
            yield row

    def waits(self) -> Mapping[str, str]:
        try:
            return asyncio.run_coroutine_threadsafe(self._broker.waits(), self._loop).result(_ANSWER_S)
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
        tasks = [asyncio.create_task(self._attend()) for _ in range(count)]
        try:
            await self._over.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _attend(self) -> None:
        """Hand shards to one worker after the other, to another worker in its place where it dies."""
        worker: _Worker | None = None
        try:
            while self._todo:
                row = self._todo.popleft()
                if not self._todo:
                    # There is nothing to go on with.
                    row = {**row, "leave_after": math.inf}
                made = None
                for _ in range(_ATTEMPTS):
                    worker = worker or _Worker(self._broker, self.reports, self._settings, self._owner)
                    made = await worker.make(row)
                    if made is not None:
                        break
                    if worker.caller:
                        # What it held of hosts' budgets is free at once, not only when it has been silent for long.
                        await self._broker.leave(worker.caller)
                    end, worker = worker.stop(), None
                    log.warning("%s: its worker died (%s); another makes it again", row["shard"], end)
                else:
                    raise LavicError(
                        f"{row['shard']}: {_ATTEMPTS} workers died while they made it, the last with {end}; is there "
                        "enough memory? fewer --ray.workers or a lower --fetch.concurrency need less"
                    )
                if made["left"]:
                    self._todo.append(later(row))
                else:
                    self._made.put(made)
        except Exception as error:
            self._made.put(error)
        finally:
            if worker is not None:
                worker.stop()


class _Worker:
    """A worker process, as the driver sees it."""

    def __init__(self, broker: Broker, reports: ShardReports, settings: CrawlSettings, owner: str) -> None:
        self._broker, self._reports = broker, reports
        self.caller = ""
        """Under which name it calls the broker now."""
        self._loop = asyncio.get_running_loop()
        self._pipe, theirs = multiprocessing.Pipe()
        self._made: asyncio.Queue[Row | Exception | None] = asyncio.Queue()
        self._calls: set[asyncio.Task[None]] = set()
        # The server that workers are forked from may be older than the environment and the folder of now.
        place = (dict(os.environ), os.getcwd())  # noqa: PTH109
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_work, args=(theirs, settings, owner, place), daemon=True)
        self._process.start()
        theirs.close()
        self._loop.add_reader(self._pipe.fileno(), self._read)

    async def make(self, row: Row) -> Row | None:
        """Have a shard made; None where the worker dies meanwhile."""
        with contextlib.suppress(OSError):
            self._pipe.send(row)
        made = await self._made.get()
        if isinstance(made, Exception):
            raise made
        return made

    def stop(self) -> str:
        """End it; says how it ended."""
        self._loop.remove_reader(self._pipe.fileno())
        for call in self._calls:
            call.cancel()
        self._process.kill()
        self._process.join()
        code = self._process.exitcode or 0
        self._process.close()
        self._pipe.close()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _read(self) -> None:
        try:
            kind, *rest = self._pipe.recv()
        except (EOFError, OSError):
            self._loop.remove_reader(self._pipe.fileno())
            self._made.put_nowait(None)
            return
        if kind == "call":
            call = self._loop.create_task(self._answer(*rest))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        elif kind == "report":
            self._reports.put(*rest)
        else:
            self._made.put_nowait(rest[0] if kind == "made" else RuntimeError(f"a worker failed\n{rest[0]}"))

    async def _answer(self, number: int, method: str, args: tuple[Any, ...]) -> None:
        if method in ("sync", "rung"):
            self.caller = args[0]
        reply: tuple[int, Any, str | None]
        try:
            reply = (number, await getattr(self._broker, method)(*args), None)
        except Exception as error:
            reply = (number, None, first_line(error))
        with contextlib.suppress(OSError):
            self._pipe.send(reply)


class _PipeOffice:
    """The broker, as a worker reaches it: each method of `Office` is a call over the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._numbers = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any) -> Any:
            loop = asyncio.get_running_loop()
            if loop is not self._loop:
                # Each shard has a loop of its own.
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
            os._exit(1)  # The driver is gone: whatever this worker makes is nobody's.
        future = self._calls.get(number)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(RuntimeError(error))


def _work(pipe: Connection, settings: CrawlSettings, owner: str, place: tuple[Mapping[str, str], str]) -> None:
    """A worker's whole life."""
    # What is meant for the whole group of processes is the driver's to act on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(place[0])
    os.chdir(place[1])
    office = cast(Office, _PipeOffice(pipe))
    while True:
        try:
            row = pipe.recv()
        except EOFError:
            return
        if not isinstance(row, dict):
            continue  # The answer to a call that the last shard gave up.
        report = partial(_report, pipe, row["number"])
        try:
            made = make_shard(row, settings, owner, office, report)
            pipe.send(("made", made))
        except BrokenPipeError:
            return
        except Exception:
            pipe.send(("failed", traceback.format_exc()))


def _report(pipe: Connection, number: int, counts: Mapping[str, int]) -> None:
    pipe.send(("report", number, dict(counts)))
