"""A worker process on this machine, which starts in tenths of a second."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from lavic.distributed.rank_process import exit_name
from lavic.distributed.signals import signal_handlers


def prepare(module: str) -> None:
    """Start the process that workers are forked from, which loads a module for all of them."""
    multiprocessing.set_forkserver_preload([module])
    # It inherits this: a Ctrl-C while it loads would end in its traceback. The driver handles signals.
    with signal_handlers([signal.SIGINT], signal.SIG_IGN):
        forkserver.ensure_running()


class WorkerProcess:
    """A process and the driver's end of a pipe to it.

    Args:
        work: At the top level of a module; called in the process with its end of the pipe and `args`.
        args: Can be pickled.
    """

    def __init__(self, work: Callable[..., None], *args: Any) -> None:
        self.pipe, child = multiprocessing.Pipe()
        # The process that workers are forked from may be older than the environment and working folder.
        surroundings = (dict(os.environ), os.getcwd())  # noqa: PTH109
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_run, args=(*surroundings, work, child, *args), daemon=True)
        self._process.start()
        child.close()

    def stop(self) -> str:
        """Kill the process; returns how it ended."""
        self._process.kill()
        self._process.join()
        return exit_name(self._process.exitcode or 0)


def _run(environment: Mapping[str, str], folder: str, work: Callable[..., None], pipe: Connection, *args: Any) -> None:
    # The driver handles signals to the process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    work(pipe, *args)
