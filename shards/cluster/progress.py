"""Photos of a crawl by outcome, as its workers report them, shown as a progress bar."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from lavic.tracking.progress import progress_bar

_STALLED_S = 4.0
"""Seconds without a further photo after which the bar says which hosts are waited for."""
_MAX_REASON = 120
"""Characters of a reason."""

Counts = Mapping[str, int]


class ShardReports:
    """The latest counts of the shards that are being made; an actor on a cluster, a plain object without one."""

    def __init__(self) -> None:
        self._counts: dict[int, dict[str, int]] = {}

    def put(self, shard: int, counts: Counts) -> None:
        """Replace the counts of a shard."""
        self._counts[shard] = dict(counts)

    def get(self) -> dict[int, dict[str, int]]:
        """The counts of every shard, finished ones too."""
        # A copy: workers may report while it is read.
        return dict(self._counts)


class CrawlProgress:
    """Counts photos by outcome and shows them on stderr, from a thread of its own, until its context ends."""

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
            settled: Photos of each shard that an earlier run has settled; they do not count for the rate.
            running: Called for the counts of the shards that are being made; it may return finished ones too.
            waits: Called for the reasons by host when nothing has been done for some seconds.
        """
        self.total = total
        self._settled = settled
        self._finished: Counter[str] = Counter()
        for counts in settled:
            self._finished.update(counts)
        self._partial: Counter[str] = Counter()
        self._before = self._finished.total()
        self._shards: set[int] = set()
        self._running, self._waits = running, waits
        self._last, self._last_at = -1, time.monotonic()
        self._began: float | None = None
        self._idle = time.time()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    @property
    def outcomes(self) -> Counter[str]:
        """Photos by outcome, those of earlier runs included."""
        with self._lock:
            return self._finished + self._partial

    @property
    def rate(self) -> float:
        """Photos per second since the first of them was requested."""
        seconds = time.time() - self._began if self._began else 0.0
        return (self.outcomes.total() - self._before) / max(1e-9, seconds) if seconds else 0.0

    def add(self, shard: int, outcomes: Counts, *, began: float) -> None:
        """Count a finished shard; `began` is in seconds since the epoch."""
        with self._lock:
            self._began = min(self._began or began, began)
            self._shards.add(shard)
            self._finished.subtract(self._settled_in(shard))
            self._finished.update(outcomes)

    def __enter__(self) -> CrawlProgress:
        self._bar = progress_bar(self.total, "photos", initial=self._before)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self._partial.clear()
        self._update()
        self._bar.close()

    def _watch(self) -> None:
        while not self._ended.wait(self._bar.mininterval):
            if self._running:
                self._count_partial(self._running())
            self._update()
            self._bar.refresh()

    def _count_partial(self, running: Mapping[int, Counts]) -> None:
        partial: Counter[str] = Counter()
        with self._lock:
            for shard, counts in running.items():
                if shard not in self._shards:
                    # Settled photos are counted already; the shard may not have come to all of them yet.
                    partial.update(Counter(counts) - Counter(self._settled_in(shard)))
            self._partial = partial
            if partial and self._began is None:
                # The work began between this report and the last, empty one.
                self._began = self._idle
            self._idle = time.time()

    def _settled_in(self, shard: int) -> Counts:
        return self._settled[shard] if shard < len(self._settled) else {}

    def _update(self) -> None:
        outcomes = self.outcomes
        self._bar.n = outcomes.total()
        if self._began:
            self._bar.start_t = self._began
        failed = [f"{kind} {n:,}" for kind, n in outcomes.most_common() if kind != "ok" and n]
        self._bar.set_postfix_str(", ".join([*failed, *self._stalled()]), refresh=False)

    def _stalled(self) -> list[str]:
        """What a crawl waits for that has made no progress for some seconds."""
        now = time.monotonic()
        if self._bar.n != self._last:
            self._last, self._last_at = self._bar.n, now
        if self._waits is None or now - self._last_at < _STALLED_S or self._ended.is_set():
            return []
        if not (hosts := dict(self._waits())):
            return []
        host, reason = next(iter(hosts.items()))
        suffix = f" and {len(hosts) - 1:,} more hosts" if len(hosts) > 1 else ""
        return [f"waiting for {host} ({reason[:_MAX_REASON]}){suffix}"]
