"""How far a job is: one line that is rewritten in a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

_TERMINAL_S, _LOG_S = 0.5, 5.0
_WIDTH = 20
_STILL_S = 4.0
"""Seconds without a further photo after which it is said what is waited for."""
_LONGEST = 120
"""Characters of a reason."""

Counts = Mapping[str, int]


class Tally:
    """What workers have done of the pieces that are not done yet; an actor on a cluster, a plain object without one."""

    def __init__(self) -> None:
        self._pieces: dict[int, dict[str, int]] = {}

    def put(self, piece: int, counts: Counts) -> None:
        """Say how far a piece is: its counts so far, in place of those said before."""
        self._pieces[piece] = dict(counts)

    def get(self) -> dict[int, dict[str, int]]:
        """The last word about every piece."""
        # A copy: the others may go on while it is read.
        return dict(self._pieces)


class Progress:
    """Counts photos by outcome and says so on stderr, from a thread of its own, until its context ends."""

    def __init__(
        self,
        total: int,
        settled: Sequence[Counts] = (),
        *,
        running: Callable[[], Mapping[int, Counts]] | None = None,
        waits: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        """Begin to count.

        Args:
            total: Photos of the job.
            settled: For each piece those that an earlier run has settled; they stand outside the rate.
            running: Asked for what is done of each piece, whole ones too.
            waits: Asked for the reasons by host when nothing has been done for some seconds.
        """
        self.total = total
        self._settled = settled
        self._whole: Counter[str] = Counter()
        for counts in settled:
            self._whole.update(counts)
        self._before = self._whole.total()
        self._pieces: set[int] = set()
        self._running, self._waits = running, waits
        self._last, self._last_at = -1, time.monotonic()
        self._part: Counter[str] = Counter()
        self._began: float | None = None
        self._idle = time.time()
        self._terminal = sys.stderr.isatty()
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    @property
    def outcomes(self) -> Counter[str]:
        """Photos by outcome, those of earlier runs included."""
        with self._lock:
            return self._whole + self._part

    @property
    def done(self) -> int:
        """Photos settled so far, those of earlier runs included."""
        return self.outcomes.total()

    @property
    def rate(self) -> float:
        """Photos per second since the first of them was asked for."""
        since = time.time() - self._began if self._began else 0.0
        return (self.done - self._before) / max(1e-9, since) if since else 0.0

    def add(self, piece: int, outcomes: Counts, *, began: float) -> None:
        """Count a piece that is whole; it was begun so many seconds after the epoch."""
        with self._lock:
            self._began = min(self._began or began, began)
            self._pieces.add(piece)
            self._whole.subtract(self._settled_of(piece))
            self._whole.update(outcomes)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if kind is None:
            self._part.clear()
        self._say()
        if self._terminal:
            print(file=sys.stderr)

    def _watch(self) -> None:
        while not self._end.wait(_TERMINAL_S if self._terminal else _LOG_S):
            if self._running:
                self._look(self._running())
            self._say()

    def _look(self, running: Mapping[int, Counts]) -> None:
        part: Counter[str] = Counter()
        with self._lock:
            for piece, counts in running.items():
                if piece not in self._pieces:
                    # What was settled before is counted already; the piece may not have come to all of it yet.
                    part.update(Counter(counts) - Counter(self._settled_of(piece)))
            self._part = part
            if part and self._began is None:
                # Before that look nothing was there: it began between the two.
                self._began = self._idle
            self._idle = time.time()

    def _settled_of(self, piece: int) -> Counts:
        return self._settled[piece] if piece < len(self._settled) else {}

    def _say(self) -> None:
        outcomes, rate = self.outcomes, self.rate
        done = outcomes.total()
        left = duration((self.total - done) / rate) if rate > 0 else "?"
        failed = ", ".join(f"{kind} {n:,}" for kind, n in outcomes.most_common() if kind != "ok" and n)
        share = done / max(1, self.total)
        text = f"{done:,}/{self.total:,} photos ({share:.0%}), {rate:,.0f}/s, {left} left"
        text += f"; {failed}" if failed else ""
        text += self._still(done)
        if self._terminal:
            filled = int(share * _WIDTH)
            text = f"\r\x1b[2K[{'#' * filled}{'.' * (_WIDTH - filled)}] {text}"
        print(text, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def _still(self, done: int) -> str:
        """What a job waits for that has stood still for some seconds."""
        now = time.monotonic()
        if done != self._last:
            self._last, self._last_at = done, now
        if self._waits is None or now - self._last_at < _STILL_S or self._end.is_set():
            return ""
        hosts = dict(self._waits())
        if not hosts:
            return ""
        host, why = next(iter(hosts.items()))
        more = f", and for {len(hosts) - 1:,} more hosts" if len(hosts) > 1 else ""
        return f"; waiting for {host} ({why[:_LONGEST]}){more}"


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
