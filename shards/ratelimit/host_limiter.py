"""The rate limit of one host for all workers of a crawl together: requests per second, connections, pauses.

Arithmetic on times that are passed in; no clock, no network. Workers report what they have seen and are granted slots,
points in time at which one request may be sent, or no limit at all. A change that invalidates slots (the host asks for
fewer requests, or only fails) raises the version; results of requests that were sent under an older version do not
count.

A single failed photo does not show the state of its host. A host asks for fewer requests if half of its latest answers
are 429 or 503, each photo counted once, or if photos that it refused are served a little later. It is down if
connections to it fail, one after the other. One that answers with errors alone gets fewer requests, for photos all over
the shards, until one succeeds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lavic.shards.pack.outcomes import Kind

UNLIMITED = math.inf
"""No limit of the rate."""
_AHEAD_S = 0.5
"""Slots are granted about this far ahead."""
_LATE_S = 0.1
"""Unused slots last this long: a late worker catches up, an idle one accumulates none."""
_RECOVERY_S = 60.0
"""Time in which a reduced rate rises by the full rate."""
_MIN_RATE = 1.0
_USUAL_RATE = 50.0
"""Lower bound of the assumed rate of a host that was measured only briefly."""
_SILENT_S = 20.0
"""A worker without a report for this time is dead; others get its connections."""
_MEASURE_S = 4.0
_FAILURES = 20
"""Failures of different photos in a row after which a host counts as failing."""
_WINDOW = 100
"""Latest answers over which the share of refusals is taken."""
_REFUSED_SHARE = 0.5
"""A smaller share of refusals (429, 503) may be due to the photos."""
_RECOVERED_SHARE = 0.05
"""Share of photos that were refused and then served from which on refusals are due to the host."""
_MIN_REFUSED = 3
"""Fewer refusals than this do not slow down a host that has served others."""
_MAX_SLOWDOWN = 8
"""Largest factor by which the rate of a host that only fails is reduced."""
_LONGEST_PAUSE = 600.0
_REMEMBER_S = 3600.0
"""The state of a host without requests is kept for this time."""
_PROBE_S = 60.0
"""Timeout of the one request after a pause, in case its worker died."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of every host."""

    rate: float = UNLIMITED
    """Requests per second."""
    connections: int = 0
    """Requests in flight; 0 is no limit."""
    backoff: float = 0.5
    """Seconds of the first pause; each further one without a success between is twice as long."""
    patience: float = 60.0
    """Maximum pause in seconds that photos wait for; in a longer one they fail at once. A host without a success for
    this time is given up too, except for a few photos of every shard."""


@dataclass(kw_only=True)
class HostReport:
    """What a worker has seen of a host since its last report, under `version` of the grant."""

    version: int = 0
    waiting: int = 0
    """Requests that wait for a permit."""
    in_flight: int = 0
    sent: int = 0
    successes: int = 0
    """Answers that show that the host works, 404 too."""
    failures: int = 0
    """Photos that failed since the last success, with a connection to the host: the photos may be the reason."""
    connect_failures: int = 0
    """Failures to connect since the last success."""
    kind: Kind = "ok"
    """Kind of the last failure."""
    reason: str = ""
    throttled: int = 0
    """Photos that were refused with 429 or 503, each counted once."""
    recovered: int = 0
    """Photos that were refused under this version and served at a retry."""
    retry_after: float = 0.0
    """Seconds from now that the host asks to wait."""


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What a worker may send to a host until the next grant."""

    version: int
    connections: int
    """Requests in flight."""
    unlimited: bool = False
    """Whether requests need no slots."""
    slots: int = 0
    start: float = 0.0
    """Seconds from now to the first slot."""
    interval: float = 0.0
    pause: float = 0.0
    """Seconds in which nothing may be sent."""
    give_up: bool = False
    """Whether the pause is too long to wait for: photos end as `kind`."""
    kind: Kind = "ok"
    """Outcome of photos that are given up; other than ok while there is any problem."""
    reason: str = ""
    answered: bool = False
    """Whether the host has answered before: if it cannot be reached now, it is down for a time."""
    scatter: bool = False
    """Whether the host only fails: then photos far from each other are requested, new ones first."""
    probe: bool = False
    """Whether the host is given up except for a few photos; when one of them succeeds, it is back."""


@dataclass
class _WorkerState:
    last_report: float
    held: int = 0
    """Connections that it holds until it reports fewer."""


class HostLimiter:
    """The rate limit of one host."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.rate = limits.rate
        self.version = 0
        self.paused_until = -math.inf
        self._base = limits.rate
        self._delay = 0.0
        """Seconds between two requests, by the host's Crawl-delay."""
        self._raised = self._next = now
        self._throttlings = self._connect_failures = self._failures = 0
        self._since = math.inf
        """Time of the first failure after the last success."""
        self._answered = False
        self._answers = self._refused = self._recovered = 0.0
        self._pause = 0.0
        self._probe: tuple[str, float] | None = None
        self._pause_reason: tuple[Kind, str] = ("ok", "")
        self._workers: dict[str, _WorkerState] = {}
        self._sent: deque[tuple[float, int]] = deque()
        self._began = self._last_report = now

    def sync(self, worker: str, report: HostReport, now: float) -> tuple[Grant, set[str]]:
        """Process a worker's report; returns what it is granted, and the workers that must sync again because of it."""
        before = (self.version, self._slowdown)
        self._record(worker, report, now)
        share = self._share(worker, report.in_flight)
        grant = replace(self._grant(worker, report, now), connections=share, answered=self._answered)
        changed = (self.version, self._slowdown) != before
        return grant, (set(self._workers) if changed else self._unbalanced()) - {worker}

    def remove_worker(self, worker: str) -> set[str]:
        """Remove a worker that has no more requests for this host; returns the workers that must sync again."""
        self._workers.pop(worker, None)
        if self._probe and self._probe[0] == worker:
            self._probe = None
        return self._unbalanced()

    def limit_rate(self, rate: float) -> set[str]:
        """Follow a Crawl-delay of the host; returns the workers that must sync again."""
        if rate >= self.limits.rate:
            return set()
        self._delay = 1 / rate
        self.limits = replace(self.limits, rate=rate)
        self.rate, self._base = min(rate, self.rate), rate
        self.version += 1
        return set(self._workers)

    def wait_reason(self, now: float) -> str:
        """Why requests wait; empty if they do not, or only for moments."""
        if self._workers and now < self.paused_until:
            return self._pause_reason[1]
        return f"one request each {self._delay:g} s (Crawl-delay)" if self._workers and self._delay >= 1 else ""

    def idle(self, now: float) -> bool:
        """Whether no worker uses it, and its state need not be kept."""
        unchanged = self.rate == self.limits.rate and not self._pause and self._since == math.inf
        expired = now - self._last_report > _REMEMBER_S
        return not self._workers and (unchanged or expired) and now > max(self.paused_until, self._next)

    @property
    def _slowdown(self) -> int:
        return min(_MAX_SLOWDOWN, 2 ** (self._failures // _FAILURES))

    def _record(self, worker: str, report: HostReport, now: float) -> None:
        for name in [n for n, other in self._workers.items() if now - other.last_report > _SILENT_S]:
            del self._workers[name]
        self._workers.setdefault(worker, _WorkerState(now)).last_report = self._last_report = now
        if report.sent:
            self._sent.append((now, report.sent))
        while self._sent and self._sent[0][0] < now - _MEASURE_S:
            self._sent.popleft()
        self._answered = self._answered or bool(report.successes or report.failures or report.throttled)
        current = report.version == self.version
        if current:
            self._count_answers(report.successes, report.throttled, report.recovered)
        if report.successes and current:
            self._throttlings = self._connect_failures = self._failures = 0
            self._since = math.inf
            if self._pause:
                self._pause, self._probe = 0.0, None
                self.version += 1
        if (report.throttled or report.recovered) and current and self._refuses:
            self._throttle(now)
        if report.retry_after and now + report.retry_after > self.paused_until:
            self._pause_until(now + report.retry_after, "unasked", f"the host asks to wait {report.retry_after:.0f} s")
        if report.failures and current:
            self._failures += report.failures
            self._since = min(self._since, now)
            if not self._pause:
                self._pause_reason = ("unasked", f"the host only fails, the last time with {report.reason}")
        if report.connect_failures and current:
            self._connect_failures += report.connect_failures
            self._since = min(self._since, now)
            if self._connect_failures >= _FAILURES or self._pause:
                # A host that never answered may not exist; one that has answered will be back.
                self._pause_unreachable(now, "unasked" if self._answered else report.kind, report.reason)

    def _count_answers(self, successes: int, refused: int, recovered: int) -> None:
        self._answers += successes + refused
        self._refused += refused
        self._recovered += recovered
        if self._answers > _WINDOW:
            self._refused *= _WINDOW / self._answers
            self._recovered *= _WINDOW / self._answers
            self._answers = _WINDOW

    @property
    def _refuses(self) -> bool:
        """Whether refusals are due to the host, not to single photos."""
        if self._recovered >= max(_MIN_REFUSED, _RECOVERED_SHARE * self._answers):
            return True
        enough_refused = self._refused >= _MIN_REFUSED or self._refused == self._answers
        return enough_refused and self._refused >= _REFUSED_SHARE * self._answers

    def _throttle(self, now: float) -> None:
        if self.rate == UNLIMITED:
            self.rate = max(2 * _MIN_RATE, self._measured(now))
            self._base, self._raised = max(_USUAL_RATE, self.rate), now
        self._raise_rate(now)
        self.rate = max(min(_MIN_RATE, self._base / (2 if self._delay else 8)), self.rate / 2)
        self._since = min(self._since, now)
        self._recovered = 0.0
        pause = min(_LONGEST_PAUSE, self.limits.backoff * 2**self._throttlings)
        self._throttlings += 1
        self._pause_until(max(self.paused_until, now + pause), "unasked", "the host asks for fewer requests (429, 503)")

    def _measured(self, now: float) -> float:
        """Requests per second that were sent lately."""
        return sum(count for _, count in self._sent) / max(0.25, min(_MEASURE_S, now - self._began))

    def _pause_unreachable(self, now: float, kind: Kind, reason: str) -> None:
        self._pause = min(_LONGEST_PAUSE, max(2 * self._pause, 4 * self.limits.backoff))
        self._connect_failures, self._probe = 0, None
        self._pause_until(now + self._pause, kind, reason)

    def _pause_until(self, until: float, kind: Kind, reason: str) -> None:
        self.paused_until, self._pause_reason = until, (kind, reason)
        self._next = max(self._next, until) if self.limits.rate < _MIN_RATE else until
        self._raised = until
        self.version += 1

    def _grant(self, worker: str, report: HostReport, now: float) -> Grant:
        paused = Grant(version=self.version, connections=0, kind=self._pause_reason[0], reason=self._pause_reason[1])
        if now < self.paused_until:
            pause_s = self.paused_until - now
            return replace(paused, pause=pause_s, give_up=max(pause_s, self._pause) > self.limits.patience)
        if self._pause:
            # One request shows whether the host is back; the others wait for its result.
            if self._probe and now < self._probe[1]:
                return replace(paused, pause=self._probe[1] - now, give_up=self._pause > self.limits.patience)
            if not report.waiting:
                return Grant(version=self.version, connections=0)
            self._probe = (worker, now + _PROBE_S)
            return Grant(version=self.version, connections=0, slots=1)
        self._raise_rate(now)
        if self._delay > self.limits.patience:
            reason = f"the host asks for {self._delay:,.0f} s between two requests, more than --fetch.patience"
            return replace(paused, pause=self._delay, give_up=True, kind="throttled", reason=reason)
        rate = self.rate
        if self._slowdown > 1 and rate > _MIN_RATE:
            # Without a limit there is no rate to divide: take the usual one.
            rate = max(_MIN_RATE, (_USUAL_RATE if rate == UNLIMITED else rate) / self._slowdown)
        if self._failures >= _FAILURES or (self._throttlings and self.rate < self.limits.rate):
            state = replace(paused, scatter=True, probe=now - self._since > self.limits.patience)
        else:
            state = Grant(version=self.version, connections=0)
        if rate == UNLIMITED:
            return replace(state, unlimited=True)
        slots = min(report.waiting, max(1, int(rate * _AHEAD_S / len(self._workers))))
        start = max(self._next, now - _LATE_S)
        self._next = start + slots / rate
        return replace(state, slots=slots, start=start - now, interval=1 / rate)

    def _raise_rate(self, now: float) -> None:
        if self.rate < self.limits.rate and now > self._raised:
            self.rate = min(self.limits.rate, self.rate + self._base * (now - self._raised) / _RECOVERY_S)
            # Without a limit in the settings, the limit ends well above the rate at which the host refused.
            if self.limits.rate == UNLIMITED and self.rate > 2 * self._base:
                self.rate = UNLIMITED
        self._raised = max(now, self._raised)

    def _share(self, worker: str, in_flight: int) -> int:
        """A worker's share of the connections that no other worker holds."""
        if not self.limits.connections:
            return 1 << 30
        held_by_others = sum(other.held for name, other in self._workers.items() if name != worker)
        share = min(self._targets()[worker], max(0, self.limits.connections - held_by_others))
        self._workers[worker].held = max(share, in_flight)
        return share

    def _targets(self) -> dict[str, int]:
        share, remainder = divmod(self.limits.connections, max(1, len(self._workers)))
        return {name: share + (index < remainder) for index, name in enumerate(self._workers)}

    def _unbalanced(self) -> set[str]:
        """Workers that hold more than their share while another waits, or less while some are free."""
        if not self.limits.connections:
            return set()
        targets = self._targets()
        held = {name: worker.held for name, worker in self._workers.items()}
        below_target = {name for name, target in targets.items() if held[name] < target}
        if not below_target:
            return set()
        above_target: Iterable[str] = (name for name, target in targets.items() if held[name] > target)
        return {*above_target, *(below_target if sum(held.values()) < self.limits.connections else ())}
