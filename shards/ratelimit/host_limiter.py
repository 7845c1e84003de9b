"""What one host may be asked by all workers of a crawl together: requests a second, connections, pauses.

Arithmetic on times that are handed in; no clock, no network. Workers report what they have seen and are granted slots,
points in time at which one request may leave, or leave to ask as they like where there is no limit. A change that
makes slots void (a host asks for less, or only fails) raises the version; what was sent under an older version says
nothing about the newer one.

One photo that fails says little about its host. A host is taken for one that asks for less when half of its latest
answers are 429 or 503, each photo counted once, or when photos that it refused are served a little later; for one that
is down when connections to it fail, one after the other. One that answers only with errors is asked more slowly, and
for photos all over the shards, until one succeeds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lavic.shards.pack.outcomes import Kind

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
"""Failures in a row, of different photos and without a success between them, after which a host is suspected."""
_WINDOW = 100
"""The latest answers, of which the share of refusals is taken."""
_REFUSED = 0.5
"""With fewer refusals (429, 503) than this they may be about the photos, not about the host."""
_PASSED = 0.05
"""Unless so many photos were refused and then served: those refusals were about the host."""
_FEW = 3
"""Refusals that slow a host down at least, where it has answered well otherwise."""
_CAUTION = 8
"""A host that answers with errors alone is asked this many times more slowly at last."""
_LONGEST_PAUSE = 600.0
_REMEMBERED_S = 3600.0
"""What went wrong with a host that nobody asks is remembered so long."""
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
    """Seconds of a pause that are waited for; in a longer one photos are given up at once. A host without a success for
    so long is given up too, but for a few photos of every shard."""


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
    """Photos that failed since the last good answer, with a connection to the host: the photos may be the reason."""
    unreached: int = 0
    """Failures to connect since the last good answer."""
    kind: Kind = "ok"
    """Of the last failure."""
    reason: str = ""
    throttled: int = 0
    """Photos that were refused with 429 or 503, each counted once."""
    passed: int = 0
    """Photos that were refused under this version, and served when they were asked for again."""
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
    """What photos end as that are given up; not ok in any trouble."""
    reason: str = ""
    answered: bool = False
    """The host has answered before: where it cannot be reached, it will be again."""
    scatter: bool = False
    """The host is suspected: ask for photos that are far from each other, and for new ones first."""
    probe: bool = False
    """The host is given up but for a few photos; where one of them succeeds, it is back."""


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
        self._delay = 0.0
        """Seconds between two requests that the host asks for."""
        self._raised = self._next = now
        self._strikes = self._unreached = self._failed = 0
        self._since = math.inf
        """The first failure after the last success."""
        self._answered = False
        self._answers = self._refused = self._passed = 0.0
        self._pause = 0.0
        self._probe: tuple[str, float] | None = None
        self._why: tuple[Kind, str] = ("ok", "")
        self._workers: dict[str, _Worker] = {}
        self._sent: deque[tuple[float, int]] = deque()
        self._began = self._heard = now

    def sync(self, worker: str, report: Report, now: float) -> tuple[Grant, set[str]]:
        """Take a worker's report in.

        Returns:
            What it is granted, and the workers that must ask again because of it.
        """
        before = (self.version, self._caution)
        self._hear(worker, report, now)
        share = self._share(worker, report.in_flight)
        grant = replace(self._grant(worker, report, now), connections=share, answered=self._answered)
        changed = (self.version, self._caution) != before
        return grant, (set(self._workers) if changed else self._uneven()) - {worker}

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
        self._delay = 1 / rate
        self.limits = replace(self.limits, rate=rate)
        self.rate, self._base = min(rate, self.rate), rate
        self.version += 1
        return set(self._workers)

    def wait(self, now: float) -> str:
        """Why those who want to ask wait; empty where they need not, or only for moments."""
        if self._workers and now < self.closed_until:
            return self._why[1]
        return f"one request each {self._delay:g} s (Crawl-delay)" if self._workers and self._delay >= 1 else ""

    def idle(self, now: float) -> bool:
        """Nobody asks it anything, and nothing of it needs to be remembered."""
        untouched = self.rate == self.limits.rate and not self._pause and self._since == math.inf
        forgotten = now - self._heard > _REMEMBERED_S
        return not self._workers and (untouched or forgotten) and now > max(self.closed_until, self._next)

    @property
    def _caution(self) -> int:
        return min(_CAUTION, 2 ** (self._failed // _FAILURES))

    def _hear(self, worker: str, report: Report, now: float) -> None:
        for name in [n for n, other in self._workers.items() if now - other.heard > _SILENT_S]:
            del self._workers[name]
        self._workers.setdefault(worker, _Worker(now)).heard = self._heard = now
        if report.sent:
            self._sent.append((now, report.sent))
        while self._sent and self._sent[0][0] < now - _MEASURE_S:
            self._sent.popleft()
        self._answered = self._answered or bool(report.well or report.failed or report.throttled)
        current = report.version == self.version
        if current:
            self._weigh(report.well, report.throttled, report.passed)
        if report.well and current:
            self._strikes = self._unreached = self._failed = 0
            self._since = math.inf
            if self._pause:
                self._pause, self._probe = 0.0, None
                self.version += 1
        if (report.throttled or report.passed) and current and self._refuses:
            self._throttle(now)
        if report.retry_after and now + report.retry_after > self.closed_until:
            self._close(now + report.retry_after, "unasked", f"the host asks for {report.retry_after:.0f} s of rest")
        if report.failed and current:
            self._failed += report.failed
            self._since = min(self._since, now)
            if not self._pause:
                self._why = ("unasked", f"the host only fails, the last time with: {report.reason}")
        if report.unreached and current:
            self._unreached += report.unreached
            self._since = min(self._since, now)
            if self._unreached >= _FAILURES or self._pause:
                # A host that was never heard of is no host; one that has answered will be back.
                self._trip(now, "unasked" if self._answered else report.kind, report.reason)

    def _weigh(self, well: int, refused: int, passed: int) -> None:
        self._answers += well + refused
        self._refused += refused
        self._passed += passed
        if self._answers > _WINDOW:
            self._refused *= _WINDOW / self._answers
            self._passed *= _WINDOW / self._answers
            self._answers = _WINDOW

    @property
    def _refuses(self) -> bool:
        """Whether refusals are so many that they are the host's, not single photos'."""
        if self._passed >= max(_FEW, _PASSED * self._answers):
            return True
        return self._refused >= _REFUSED * self._answers and (self._refused >= _FEW or self._refused == self._answers)

    def _throttle(self, now: float) -> None:
        if self.rate == FREE:
            self.rate = max(2 * _SLOWEST, self._measured(now))
            self._base, self._raised = max(_USUAL, self.rate), now
        self._raise(now)
        self.rate = max(min(_SLOWEST, self._base / (2 if self._delay else 8)), self.rate / 2)
        self._since = min(self._since, now)
        self._passed = 0.0
        pause = min(_LONGEST_PAUSE, self.limits.backoff * 2**self._strikes)
        self._strikes += 1
        self._close(max(self.closed_until, now + pause), "unasked", "the host asks for fewer requests (429, 503)")

    def _measured(self, now: float) -> float:
        """Requests a second that were sent lately."""
        return sum(count for _, count in self._sent) / max(0.25, min(_MEASURE_S, now - self._began))

    def _trip(self, now: float, kind: Kind, reason: str) -> None:
        self._pause = min(_LONGEST_PAUSE, max(2 * self._pause, 4 * self.limits.backoff))
        self._unreached, self._probe = 0, None
        self._close(now + self._pause, kind, reason)

    def _close(self, until: float, kind: Kind, reason: str) -> None:
        self.closed_until, self._why = until, (kind, reason)
        self._next = max(self._next, until) if self.limits.rate < _SLOWEST else until
        self._raised = until
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
        if self._delay > self.limits.patience:
            reason = f"the host asks for {self._delay:,.0f} s between two requests, more than --fetch.patience"
            return replace(closed, closed=self._delay, give_up=True, kind="throttled", reason=reason)
        rate = self.rate
        if self._caution > 1 and rate > _SLOWEST:
            # Without a limit nobody knows how much is little: as much as hosts are asked for usually.
            rate = max(_SLOWEST, (_USUAL if rate == FREE else rate) / self._caution)
        if self._failed >= _FAILURES or (self._strikes and self.rate < self.limits.rate):
            state = replace(closed, scatter=True, probe=now - self._since > self.limits.patience)
        else:
            state = Grant(version=self.version, connections=0)
        if rate == FREE:
            return replace(state, free=True)
        slots = min(report.wanted, max(1, int(rate * _AHEAD_S / len(self._workers))))
        start = max(self._next, now - _LATE_S)
        self._next = start + slots / rate
        return replace(state, slots=slots, start=start - now, interval=1 / rate)

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
