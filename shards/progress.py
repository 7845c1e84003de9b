"""How far a job is: one line that is rewritten in a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType

_TERMINAL_S, _LOG_S = 0.2, 5.0


class Progress:
    """Counts photos by outcome and says so on stderr."""

    def __init__(self, total: int, outcomes: Mapping[str, int] | None = None) -> None:
        """Begin to count `total` photos, of which `outcomes` are settled already."""
        self.total = total
        self.outcomes: Counter[str] = Counter(outcomes or {})
        self._before = self.outcomes.total()
        self._began = self._said = time.time()
        self._counted = False
        self._terminal = sys.stderr.isatty()

    @property
    def done(self) -> int:
        """Photos settled so far, those of earlier runs included."""
        return self.outcomes.total()

    @property
    def rate(self) -> float:
        """Photos per second since the first of them was asked for."""
        return (self.done - self._before) / max(1e-9, time.time() - self._began)

    def add(self, outcomes: Mapping[str, int], *, began: float) -> None:
        """Count the photos of one shard, which was begun so many seconds after the epoch."""
        self._began = min(self._began, began) if self._counted else began
        self._counted = True
        self.outcomes.update(outcomes)
        now = time.time()
        if now - self._said >= (_TERMINAL_S if self._terminal else _LOG_S):
            self._said = now
            self._say()

    def __enter__(self) -> Progress:
        if self._terminal:
            self._say()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            self._say()
            print(file=sys.stderr)

    def _say(self) -> None:
        rate = self.rate
        left = _duration((self.total - self.done) / rate) if rate > 0 else "?"
        failed = ", ".join(f"{kind} {n:,}" for kind, n in self.outcomes.most_common() if kind != "ok" and n)
        share = self.done / max(1, self.total)
        text = f"{self.done:,}/{self.total:,} photos ({share:.0%}), {rate:,.0f}/s, {left} left"
        text += f"; {failed}" if failed else ""
        print(f"\r\x1b[2K{text}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
