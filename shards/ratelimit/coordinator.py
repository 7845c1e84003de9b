"""The rate limits and robots.txt of all hosts, shared by all workers of a crawl.

A crawl on Ray runs it as an actor; local workers call it over pipes.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from lavic.distributed.ray_session import actor_beside_driver
from lavic.shards.http.robots import MAX_AGE_S, RETRY_S, Robots
from lavic.shards.pack.outcomes import Kind
from lavic.shards.ratelimit.host_limiter import UNLIMITED, Grant, HostLimiter, HostReport, Limits

_POLL_S = 5.0
"""`wait_for_change` returns after this time at the latest."""
_SILENT_S = 10.0
"""If the worker that fetches a robots.txt does not report for this time, another one fetches it."""
_MAX_SITES = 10_000
"""Sites whose robots.txt is kept; beyond that the least recently used ones are fetched again when needed."""
_LONGEST_WAIT_S = 10.0
"""Maximum time between two attempts to read a robots.txt that photos wait for."""
_NETWORK: frozenset[Kind] = frozenset({"dns", "connect", "tls", "timeout"})


@dataclass
class _Site:
    robots: Robots | None = None
    valid_until: float = 0.0
    fetcher: str = ""
    """The worker that is fetching it."""
    fetched: asyncio.Event = field(default_factory=asyncio.Event)
    failures: int = 0
    """Failed attempts in a row, without a success before them."""
    failing_since: float = 0.0
    next_attempt: float = 0.0
    answered: bool = False
    """Whether one of the failed attempts got a response, but not a robots.txt."""
    reason: str = ""
    """Reason of the last failure."""


class Coordinator:
    """Rate limits and robots.txt of all hosts of a crawl."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._hosts: dict[str, HostLimiter] = {}
        self._changed: dict[str, asyncio.Event] = {}
        """Events by worker: set when it must sync."""
        self._last_seen: dict[str, float] = {}
        self._rate_limits: dict[str, float] = {}
        self._sites: OrderedDict[str, _Site] = OrderedDict()
        self._swept = clock()

    async def sync(self, worker: str, reports: dict[str, HostReport], idle: list[str]) -> dict[str, Grant]:
        """Process a worker's reports by host, and the hosts it no longer uses; returns its grants."""
        now = self._last_seen[worker] = self._clock()
        grants = {}
        for name in idle:
            if name in self._hosts:
                self._notify(self._hosts[name].remove_worker(worker))
        for name, report in reports.items():
            if name not in self._hosts:
                self._hosts[name] = HostLimiter(self._limits, now)
                self._hosts[name].limit_rate(self._rate_limits.get(name, UNLIMITED))
            grants[name], affected = self._hosts[name].sync(worker, report, now)
            self._notify(affected)
        if now - self._swept > 60.0:
            self._swept = now
            self._hosts = {name: host for name, host in self._hosts.items() if not host.idle(now)}
            for silent in [name for name, last_seen in self._last_seen.items() if now - last_seen > 60.0]:
                del self._last_seen[silent]
                self._changed.pop(silent, None)
        return grants

    async def wait_for_change(self, worker: str) -> None:
        """Return when a worker must sync, or after some seconds."""
        changed = self._changed.setdefault(worker, asyncio.Event())
        await _wait(changed, _POLL_S)
        changed.clear()

    async def remove_worker(self, worker: str) -> None:
        """Remove a worker that has no more requests for any host."""
        for host in self._hosts.values():
            self._notify(host.remove_worker(worker))
        self._changed.pop(worker, None)
        self._last_seen.pop(worker, None)

    async def limit_rate(self, host: str, rate: float) -> None:
        """Follow a Crawl-delay: at most `rate` requests per second to a host."""
        self._rate_limits[host] = min(rate, self._rate_limits.get(host, UNLIMITED))
        if host in self._hosts:
            self._notify(self._hosts[host].limit_rate(rate))

    async def get_robots(self, site: str, worker: str) -> Robots | None:
        """The robots.txt of a site; None: the worker must fetch it and call `put_robots`."""
        self._last_seen[worker] = self._clock()
        while True:
            known = self._sites.setdefault(site, _Site())
            self._sites.move_to_end(site)
            now = self._clock()
            if known.fetcher and now - self._last_seen.get(known.fetcher, now - _SILENT_S) < _SILENT_S:
                await _wait(known.fetched, 1.0)
            elif known.robots and now < known.valid_until:
                return known.robots
            elif now < known.next_attempt:
                await asyncio.sleep(min(1.0, known.next_attempt - now))
            else:
                known.fetcher = worker
                known.fetched.clear()
                return None

    async def put_robots(self, site: str, robots: Robots) -> Robots | None:
        """Store what a worker has fetched; returns what is valid now, None if that is not known yet.

        Reading is attempted again for `patience` seconds, in which photos wait. One that was read stays valid when a
        later attempt fails.
        """
        known = self._sites.setdefault(site, _Site())
        now = self._clock()
        known.fetcher = ""
        if robots.kind == "ok":
            known.robots, known.valid_until, known.failures, known.answered = robots, now + MAX_AGE_S, 0, False
        elif known.robots and known.robots.kind == "ok":
            known.valid_until = now + RETRY_S
        else:
            known.answered = known.answered or robots.kind not in _NETWORK
            self._put_failure(known, robots, now)
        known.fetched.set()
        while len(self._sites) > _MAX_SITES:
            self._sites.popitem(last=False)
        return known.robots if now < known.valid_until else None

    def _put_failure(self, known: _Site, robots: Robots, now: float) -> None:
        if not known.failures:
            known.failing_since = now
        known.reason = robots.reason
        remaining_s = known.failing_since + self._limits.patience - now
        if not robots.final and remaining_s > 0:
            # The last attempt is at the very end.
            known.next_attempt = now + min(
                remaining_s, _LONGEST_WAIT_S, max(0.1, self._limits.backoff) * 2**known.failures
            )
        else:
            # A host that has answered is up: the next run requests its photos.
            kind = "unasked" if known.answered and not robots.final else robots.kind
            known.robots, known.valid_until = replace(robots, kind=kind), now + RETRY_S
        known.failures = min(60, known.failures + 1)

    async def wait_reasons(self) -> dict[str, str]:
        """Why photos wait, by host, or by site where its robots.txt cannot be read."""
        now = self._clock()
        reasons = {name: reason for name, host in self._hosts.items() if (reason := host.wait_reason(now))}
        for name, site in self._sites.items():
            valid = site.robots and now < site.valid_until
            if site.failures and site.next_attempt > now - _LONGEST_WAIT_S and not valid:
                reasons[name] = f"robots.txt cannot be read: {site.reason}"
        return reasons

    def _notify(self, workers: Iterable[str]) -> None:
        for worker in workers:
            self._changed.setdefault(worker, asyncio.Event()).set()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, but no longer; unlike `wait_for`, never swallows a cancellation."""
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([waiting], timeout=seconds)
    finally:
        waiting.cancel()


class RayCoordinator:
    """A coordinator as a Ray actor: its methods return awaitable references. It may be passed to workers."""

    def __init__(self, limits: Limits) -> None:
        self._actor = actor_beside_driver(
            Coordinator,
            limits,
            name=f"lavic-coordinator-{uuid.uuid4().hex[:12]}",
            max_task_retries=-1,
            max_concurrency=10_000,
        )

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return getattr(self._actor, method).remote
