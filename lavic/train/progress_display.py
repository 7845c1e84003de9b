"""What a person sees of a run: one live line in a terminal, some twenty plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping


class Console:
    """Writes a run's progress to standard error."""

    def __init__(self, total: int, *, start: int = 0, shown: bool = True) -> None:
        """Begins.

        Args:
            total: Steps of the run.
            start: Steps done before.
            shown: False writes nothing: ranks other than 0.
        """
        self._total, self._start, self._shown = total, start, shown
        self._live = shown and sys.stderr.isatty()
        self._every = max(1, total // 20)
        self._began = time.monotonic()
        self._width = 0

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A step was taken."""
        if not self._shown or not (self._live or step % self._every == 0 or step == self._total):
            return
        left = (time.monotonic() - self._began) / max(1, step - self._start) * (self._total - step)
        line = (
            f"step {step}/{self._total}  "
            + (f"loss {values['loss']:.4f}  " if "loss" in values else "left out  ")
            + f"lr {values['lr']:.2e}  "
            f"{values['samples_per_s']:.1f} samples/s  "
            + (f"{values['mfu']:.0%} of peak  " if "mfu" in values else "")
            + f"{_clock(left)} left"
        )
        if self._live:
            print(f"\r{line:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._shown:
            self.close()
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the live line."""
        if self._live and self._width:
            print(file=sys.stderr)
            self._width = 0


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
