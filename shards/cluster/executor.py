"""Where a job runs: on Ray or in local processes, until it is done or a scheduler stops it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from lavic.distributed.ray_session import RaySettings
from lavic.distributed.signals import signal_handlers
from lavic.errors import Stopped

Executor = Literal["auto", "local", "ray"]


def check_executor(executor: Executor, ray: RaySettings) -> None:
    """Raise ValueError for settings that contradict each other."""
    if executor == "local" and (ray.address or ray.nodes > 1):
        raise ValueError("--executor local does not use Ray; remove it, or --ray.address and --ray.nodes")


def uses_ray(executor: Executor, ray: RaySettings, *, large: bool = False) -> bool:
    """Whether a job runs on Ray: by its settings, else if Ray is named or running, or the job is large."""
    if executor != "auto":
        return executor == "ray"
    if ray.address or ray.nodes > 1 or os.environ.get("RAY_ADDRESS"):
        return True
    module = sys.modules.get("ray")
    return large or bool(module and module.is_initialized())


@contextmanager
def stop_on_signal(finished: str) -> Iterator[None]:
    """Stop the job at a scheduler's signal (SIGUSR1).

    Raises:
        Stopped: The signal came; `finished` says what the next run need not do again.
    """
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt  # Ray passes it on, but reports other exceptions

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        with signal_handlers([signal.SIGUSR1], stop):
            yield
    except KeyboardInterrupt:
        if stopped:
            raise Stopped(f"stopped on request; {finished} are kept; run the same command again to continue") from None
        raise
