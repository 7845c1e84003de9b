"""Runs a function on many tasks: in local processes, or as a Ray Data job.

A task is a plain value and its result too; what it makes, it writes to files. A worker that dies is replaced, and its
task runs again. Local workers end with the driver, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

from lavic.distributed.ray_session import RaySettings, ray_session
from lavic.errors import DataError, LavicError
from lavic.shards.cluster.worker_process import WorkerProcess

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


def _outcome(function: Callable[[Any], Any], task: Any) -> tuple[Any, str, bool]:
    """A task's result, or its error as text and whether its message is for the user."""
    try:
        return function(task), "", False
    except LavicError as error:
        return None, str(error), True
    except OSError as error:  # a full disk, a file that is gone
        location = f"{error.filename}: " if error.filename else ""
        return None, f"{location}{error.strerror or error}; run the same command again when that is mended", False
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
    pending = deque(tasks)
    workers: list[WorkerProcess] = []
    count = min(settings.workers or settings.cpus or len(os.sched_getaffinity(0)), len(tasks))
    closing = threading.Event()

    def feed() -> None:
        workers.append(worker := WorkerProcess(_work, function))
        with suppress(IndexError):
            while True:
                task = pending.popleft()
                for _ in range(_ATTEMPTS):
                    outcome = _run(worker, task)
                    if outcome is not None:
                        break
                    if closing.is_set():
                        return
                    ended = worker.stop()
                    workers.append(worker := WorkerProcess(_work, function))
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
            pending.clear()
            for worker in workers:
                worker.stop()


def _run(worker: WorkerProcess, task: Any) -> Any:
    """A task's outcome; None if the process dies."""
    try:
        worker.pipe.send(task)
        return worker.pipe.recv()
    except (EOFError, OSError):
        return None


def _work(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """The worker process."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_outcome(function, pipe.recv()))


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    if driver is not None:
        wait([driver.sentinel])
        os._exit(1)
