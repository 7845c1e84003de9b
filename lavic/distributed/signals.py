"""Stop requests: SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C are noted, and acted on at a step's end."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lavic.distributed.context import World
from lavic.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Notes stop signals while it is open; a second Ctrl-C interrupts at once. One that is not open is never asked.

    A signal reaches one rank or all of them: the ranks agree on it at the end of each step.

    Attributes:
        asked: Whether this process was asked to stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}
        self._blocked: set[int] = set()

    def heed(self, world: World) -> None:
        """Stops all ranks here if any of them was asked to. Collective.

        Raises:
            Stopped: Nothing was saved by this.
        """
        if world.agree(self.asked):
            raise Stopped("stopped on request; run the same command again to go on")

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {name: signal.signal(name, self._note) for name in SIGNALS}
            # A launcher may have blocked one until it can be heeded: now.
            self._blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)  # first: a late signal must not meet the default
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.asked = True
