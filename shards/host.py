"""What one host may be asked by all workers of a crawl together: requests a second, connections, pauses.

Arithmetic on times that are handed in; no clock, no network. Workers report what they have seen and are granted slots,
points in time at which one request may leave, or leave to ask as they like where there is no limit. A change that
makes slots void (a host asks for less, or only fails) raises the version; what was sent under an older version says
nothing about the newer one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lavic.shards.outcomes import Kind

FREE = math.inf
"""A rate without a limit."""
_AHEAD_S = 0.5
"""Slots are leased for about so long."""
_LATE_S = 0.1
"""Slots that nobody took are kept so long: a late worker makes up for them, an idle one gathers none."""
_RAISE_S = 60.0
"""A rate that was halved comes back by the whole in so long."""
_SLOWEST = 1.0
_USUAL = 50.0
"""What little was measured of a host just met is not taken for all that it can do."""
_SILENT_S = 20.0
"""A worker that was not heard for so long is dead, and what it held is given to the others."""
_MEASURE_S = 4.0
_FAILURES = 20
"""Failures in a row, without an answer between them, after which a host is left alone for a while."""
_LONGEST_PAUSE = 600.0
_PROBE_S = 60.0
"""An answer to the one request after a pause is awaited so long, in case that its worker died."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The budget of every host."""

    rate: float = FREE
    """Requests a second."""
    connections: int = 0
    """Requests at once; 0 is no limit."""
    backoff: float = 0.5
    """Seconds of the first pause; doubled for each that follows without success between."""
    patience: float = 60.0
    """Seconds of a pause that are waited for; in a longer one photos are given up at once."""


@dataclass(kw_only=True)
class Report:
    """What a worker has seen of a host since its last report, under `version`."""

    version: int = 0
    wanted: int = 0
    """Requests that wait for leave."""
    in_flight: int = 0
    sent: int = 0
    well: int = 0
    """Answers that show a host at work, 404 too."""
    failed: int = 0
    """Failures since the last good answer."""
    kind: Kind = "ok"
    """Of the last failure."""
    reason: str = ""
    throttled: bool = False
    retry_after: float = 0.0
    """Seconds, from now, that the host asks to be left alone."""


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What a worker may ask of a host until it hears otherwise."""

    version: int
    connections: int
    """Requests at once."""
    free: bool = False
    """No slots needed."""
    slots: int = 0
    start: float = 0.0
    """Seconds from now to the first slot."""
    interval: float = 0.0
    closed: float = 0.0
    """Seconds for which nothing may be asked."""
    give_up: bool = False
    """That is too long to wait for: photos end as `kind`."""
    kind: Kind = "ok"
    reason: str = ""


@dataclass
class _Worker:
    heard: float
    held: int = 0
    """Connections that are its own until it reports fewer."""


class Host:
    """One host's budget."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.rate = limits.rate
        self.version = 0
        self.closed_until = -math.inf
        self._base = limits.rate
        self._raised = self._next = now
        self._strikes = self._failed = 0
        self._pause = 0.0
        self._probe: tuple[str, float] | None = None
        self._why: tuple[Kind, str] = ("ok", "")
        self._workers: dict[str, _Worker] = {}
        self._sent: deque[tuple[float, int]] = deque()
        self._began = now

    def sync(self, worker: str, report: Report, now: float) -> tuple[Grant, set[str]]:
        """Take a worker's report in.

        Returns:
            What it is granted, and the workers that must ask again because of it.
        """
        before = self.version
        self._hear(worker, report, now)
        grant = replace(self._grant(worker, report, now), connections=self._share(worker, report.in_flight))
        return grant, (set(self._workers) if self.version != before else self._uneven()) - {worker}

    def leave(self, worker: str) -> set[str]:
        """A worker has nothing more to ask of this host; returns those that gain by it."""
        self._workers.pop(worker, None)
        if self._probe and self._probe[0] == worker:
            self._probe = None
        return self._uneven()

    def cap(self, rate: float) -> set[str]:
        """The host itself asks for no more than `rate`; returns the workers that must ask again."""
        if rate >= self.limits.rate:
            return set()
        self.limits = replace(self.limits, rate=rate)
        self.rate, self._base = min(rate, self.rate), rate
        self.version += 1
        return set(self._workers)

    def idle(self, now: float) -> bool:
        """Nobody asks it anything, and nothing of it needs to be remembered."""
        untouched = self.rate == self.limits.rate and not self._pause and now > self.closed_until
        return not self._workers and untouched

    def _hear(self, worker: str, report: Report, now: float) -> None:
        for name in [n for n, other in self._workers.items() if now - other.heard > _SILENT_S]:
            del self._workers[name]
        self._workers.setdefault(worker, _Worker(now)).heard = now
        if report.sent:
            self._sent.append((now, report.sent))
        while self._sent and self._sent[0][0] < now - _MEASURE_S:
            self._sent.popleft()
        current = report.version == self.version
        if report.well and current:
            self._strikes = self._failed = 0
            if self._pause:
                self._pause, self._probe = 0.0, None
                self.version += 1
        if report.throttled and current:
            self._throttle(now)
        if report.retry_after and now + report.retry_after > self.closed_until:
            self._close(now + report.retry_after, "throttled", f"the host asks for {report.retry_after:.0f} s of rest")
        if report.failed and current:
            self._failed += report.failed
            self._why = (report.kind, report.reason)
            if self._failed >= _FAILURES or self._pause:
                self._trip(now)

    def _throttle(self, now: float) -> None:
        if self.rate == FREE:
            seconds = max(0.25, min(_MEASURE_S, now - self._began))
            self.rate = max(2 * _SLOWEST, sum(count for _, count in self._sent) / seconds)
            self._base, self._raised = max(_USUAL, self.rate), now
        self._raise(now)
        self.rate = max(min(_SLOWEST, self._base / 8), self.rate / 2)
        pause = min(_LONGEST_PAUSE, self.limits.backoff * 2**self._strikes)
        self._strikes += 1
        self._close(max(self.closed_until, now + pause), "throttled", "the host asks for fewer requests")

    def _trip(self, now: float) -> None:
        self._pause = min(_LONGEST_PAUSE, max(2 * self._pause, 4 * self.limits.backoff))
        self._failed, self._probe = 0, None
        kind, reason = self._why
        self._close(now + self._pause, kind, reason)

    def _close(self, until: float, kind: Kind, reason: str) -> None:
        self.closed_until, self._why = until, (kind, reason)
        self._next = self._raised = until
        self.version += 1

    def _grant(self, worker: str, report: Report, now: float) -> Grant:
        closed = Grant(version=self.version, connections=0, kind=self._why[0], reason=self._why[1])
        if now < self.closed_until:
            left = self.closed_until - now
            return replace(closed, closed=left, give_up=max(left, self._pause) > self.limits.patience)
        if self._pause:
            # One request shows whether it is back; the others wait for what becomes of it.
            if self._probe and now < self._probe[1]:
                return replace(closed, closed=self._probe[1] - now, give_up=self._pause > self.limits.patience)
            if not report.wanted:
                return Grant(version=self.version, connections=0)
            self._probe = (worker, now + _PROBE_S)
            return Grant(version=self.version, connections=0, slots=1)
        self._raise(now)
        if self.rate == FREE:
            return Grant(version=self.version, connections=0, free=True)
        slots = min(report.wanted, max(1, int(self.rate * _AHEAD_S / len(self._workers))))
        start = max(self._next, now - _LATE_S)
        self._next = start + slots / self.rate
        return Grant(
            version=self.version,
            connections=0,
            slots=slots,
            start=start - now,
            interval=1 / self.rate if slots else 0.0,
        )

    def _raise(self, now: float) -> None:
        if self.rate < self.limits.rate and now > self._raised:
            self.rate = min(self.limits.rate, self.rate + self._base * (now - self._raised) / _RAISE_S)
            # Without a limit of ours: well above where the host complained there is none again.
            if self.limits.rate == FREE and self.rate > 2 * self._base:
                self.rate = FREE
        self._raised = max(now, self._raised)

    def _share(self, worker: str, in_flight: int) -> int:
        """Its part of the connections, of those that no other worker holds."""
        if not self.limits.connections:
            return 1 << 30
        others = sum(other.held for name, other in self._workers.items() if name != worker)
        share = min(self._targets()[worker], max(0, self.limits.connections - others))
        self._workers[worker].held = max(share, in_flight)
        return share

    def _targets(self) -> dict[str, int]:
        each, more = divmod(self.limits.connections, max(1, len(self._workers)))
        return {name: each + (place < more) for place, name in enumerate(self._workers)}

    def _uneven(self) -> set[str]:
        """Workers that hold more than their part while another waits, or less while there is room."""
        if not self.limits.connections:
            return set()
        targets = self._targets()
        held = {name: worker.held for name, worker in self._workers.items()}
        short = {name for name, target in targets.items() if held[name] < target}
        if not short:
            return set()
        over: Iterable[str] = (name for name, target in targets.items() if held[name] > target)
        return {*over, *(short if sum(held.values()) < self.limits.connections else ())}
