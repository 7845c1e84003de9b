"""Runs a function on many tasks: in local processes, or as a Ray Data job.

A task is a plain value and its result too; what it makes, it writes to files. A worker that dies is replaced, and its
task runs again. Local workers end with the driver, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

from lavic.distributed.rank_process import exit_name
from lavic.distributed.ray_session import RaySettings, ray_session
from lavic.distributed.signals import signal_handlers
from lavic.errors import DataError, LavicError

_ATTEMPTS = 3
"""Workers that may die of one task."""


def run_tasks(
    function: Callable[[Any], Any], tasks: Sequence[Any], settings: RaySettings, *, on_ray: bool
) -> Iterator[tuple[Any, Any]]:
    """Runs a function on each task; yields tasks and results as they end.

    Args:
        function: At the top level of a module. Of its errors, `DataError` ends the work with its message.
        tasks: Plain values that can be pickled.
        settings: Where, and how many at a time.
        on_ray: As a Ray Data job; else in local processes.

    Raises:
        DataError: The function's.
        LavicError: It failed, or its workers died repeatedly.
        LaunchError: Ray cannot be reached or started.
    """
    if not tasks:
        return
    for task, (result, error, known) in (_ray_results if on_ray else _local_results)(function, tasks, settings):
        if error:
            raise DataError(error) if known else LavicError(error)
        yield task, result


def prepare(module: str) -> None:
    """Starts the process that local workers are forked from, which loads a module for all of them."""
    multiprocessing.set_forkserver_preload([module])
    # It inherits this: a Ctrl-C while it loads would end in its traceback. The driver handles signals.
    with signal_handlers([signal.SIGINT], signal.SIG_IGN):
        forkserver.ensure_running()


def worker_count(settings: RaySettings) -> int:
    """Local processes at a time."""
    return settings.workers or settings.cpus or len(os.sched_getaffinity(0))


def _outcome(function: Callable[[Any], Any], task: Any) -> tuple[Any, str, bool]:
    """A task's result, or its error as text and whether its message is for the user."""
    try:
        return function(task), "", False
    except LavicError as error:
        return None, str(error), True
    except OSError as error:  # a full disk, a file that is gone
        place = f"{error.filename}: " if error.filename else ""
        return None, f"{place}{error.strerror or error}; run the same command again when that is mended", False
    except Exception:
        return None, f"a worker failed\n{traceback.format_exc()}", False


def _ray_results(
    function: Callable[[Any], Any], tasks: Sequence[Any], settings: RaySettings
) -> Iterator[tuple[Any, tuple[Any, str, bool]]]:
    with ray_session(settings):
        import pickle

        import pyarrow as pa
        import ray.data

        def run(row: dict[str, Any]) -> dict[str, Any]:
            return {"number": row["number"], "outcome": pickle.dumps(_outcome(function, pickle.loads(row["task"])))}

        # A block for each task, so that each is a Ray task.
        blocks = [pa.table({"number": [n], "task": [pickle.dumps(task)]}) for n, task in enumerate(tasks)]
        job = ray.data.from_arrow(blocks).map(run, num_cpus=1, concurrency=settings.workers)
        for row in job.iter_rows():
            yield tasks[row["number"]], pickle.loads(row["outcome"])


def _local_results(
    function: Callable[[Any], Any], tasks: Sequence[Any], settings: RaySettings
) -> Iterator[tuple[Any, tuple[Any, str, bool]]]:
    results: SimpleQueue[tuple[Any, tuple[Any, str, bool]]] = SimpleQueue()
    left = deque(tasks)
    workers: list[_Worker] = []
    count = min(worker_count(settings), len(tasks))
    closing = threading.Event()

    def feed() -> None:
        worker = _Worker(function)
        workers.append(worker)
        with suppress(IndexError):
            while True:
                task = left.popleft()
                for _ in range(_ATTEMPTS):
                    outcome = worker.run(task)
                    if outcome is not None:
                        break
                    if closing.is_set():
                        return
                    ended = worker.stop()
                    worker.start()
                else:
                    outcome = (
                        None,
                        f"{_ATTEMPTS} workers died of the same task, the last with {ended}; if memory is short, use "
                        "fewer --ray.workers",
                        False,
                    )
                results.put((task, outcome))

    with ThreadPoolExecutor(count, "tasks") as pool:
        try:
            for _ in range(count):
                pool.submit(feed)
            for _ in tasks:
                yield results.get()
        finally:
            closing.set()
            left.clear()
            for worker in workers:
                worker.stop()


class _Worker:
    """The driver's side of a worker process, used by one thread."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self.start()

    def start(self) -> None:
        self._pipe, child = multiprocessing.Pipe()
        surroundings = (dict(os.environ), os.getcwd())  # noqa: PTH109
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_work, args=(child, self._function, surroundings), daemon=True)
        self._process.start()
        child.close()

    def run(self, task: Any) -> Any:
        """A task's outcome; None if the process dies."""
        try:
            self._pipe.send(task)
            return self._pipe.recv()
        except (EOFError, OSError):
            return None

    def stop(self) -> str:
        """Kills the process; returns how it ended."""
        self._process.kill()
        self._process.join()
        code = self._process.exitcode or 0
        return exit_name(code)


def _work(pipe: Connection, function: Callable[[Any], Any], surroundings: tuple[dict[str, str], str]) -> None:
    """The worker process. The driver handles signals to the process group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(surroundings[0])
    os.chdir(surroundings[1])
    threading.Thread(target=_end_with_driver, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_outcome(function, pipe.recv()))


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    if driver is not None:
        wait([driver.sentinel])
        os._exit(1)
