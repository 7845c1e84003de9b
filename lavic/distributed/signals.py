"""Stop requests: SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C, acted on at the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lavic.distributed.context import DistributedContext
from lavic.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Records stop signals while it is open: a context manager. A second Ctrl-C interrupts at once.

    A signal may reach one rank or all of them: the ranks agree on it at the end of each step.

    Attributes:
        requested: Whether this process has got a stop signal.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}
        self._blocked: set[int] = set()

    def raise_if_requested(self, world: DistributedContext) -> None:
        """Raises Stopped on all ranks if any of them has got a stop signal. Collective; saves nothing."""
        if world.any_rank(self.requested):
            raise Stopped("stopped on request; run the same command again to resume")

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {name: signal.signal(name, self._on_signal) for name in SIGNALS}
            # A launcher may have blocked them until there is a handler.
            self._blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            # First, so that a late signal does not meet the default handler.
            signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.requested = True


@contextmanager
def signal_handlers(
    numbers: Sequence[int], handler: Callable[[int, FrameType | None], None] | signal.Handlers
) -> Iterator[None]:
    """Installs a handler of some signals while the block runs. Only the main thread may."""
    previous_handlers = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous_handler in previous_handlers.items():
            signal.signal(number, previous_handler)


@contextmanager
def forwarded_signals(numbers: Sequence[int], send: Callable[[int], None], kill: Callable[[], None]) -> Iterator[None]:
    """Forwards signals to other processes while the block runs. The third Ctrl-C calls `kill` instead of `send`."""
    interrupts = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 2:
            kill()
        else:
            send(number)

    with signal_handlers(numbers, forward):
        yield
