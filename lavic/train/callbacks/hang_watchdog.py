"""Reports to the hang watchdog which part of a step this rank is in."""

from __future__ import annotations

from lavic.distributed.hang_watchdog import HangWatchdog
from lavic.train.callbacks.callback import Callback
from lavic.train.trainer import Trainer


class HangWatchdogCallback(Callback):
    """Lets the watchdog name the rank that the others wait for, and where it is."""

    def __init__(self, watchdog: HangWatchdog) -> None:
        self._watchdog = watchdog

    def enter_phase(self, trainer: Trainer, phase: str) -> None:
        self._watchdog.mark(phase)
