"""The one place that knows what a crawl's workers ask of each host, and what each host's robots.txt says.

A crawl over several processes has it as a Ray actor; a single process uses it as it is.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from lavic.shards.http.robots import KEPT_S, RETRY_S, Robots
from lavic.shards.pack.outcomes import Kind
from lavic.shards.ratelimit.host_limiter import FREE, Grant, Host, Limits, Report

_LONG_S = 5.0
"""A question for news is answered after so long, news or none."""
_SILENT_S = 10.0
"""A robots.txt whose worker was not heard for so long is another's to fetch; workers speak every two seconds."""
_SITES = 10_000
"""Sites whose robots.txt is kept; of more, the one that was asked for longest ago is fetched again when needed."""
_LONGEST_WAIT_S = 10.0
"""Between two readings of a robots.txt that cannot be read, while photos wait for it."""
_NETWORK: frozenset[Kind] = frozenset({"dns", "connect", "tls", "timeout"})


@dataclass
class _Site:
    robots: Robots | None = None
    until: float = 0.0
    """`robots` holds."""
    fetcher: str = ""
    """The worker that is fetching it."""
    told: asyncio.Event = field(default_factory=asyncio.Event)
    failures: int = 0
    """Readings in a row that failed, none before them having succeeded."""
    since: float = 0.0
    """The first of them."""
    again: float = 0.0
    """When the next is due."""
    heard: bool = False
    """One of them had an answer, though not a robots.txt."""
    reason: str = ""
    """Of the last of them."""


class Broker:
    """Budgets and robots.txt of all hosts of a crawl."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._hosts: dict[str, Host] = {}
        self._bells: dict[str, asyncio.Event] = {}
        self._heard: dict[str, float] = {}
        self._caps: dict[str, float] = {}
        self._sites: OrderedDict[str, _Site] = OrderedDict()
        self._swept = clock()

    async def sync(self, worker: str, reports: dict[str, Report], left: list[str]) -> dict[str, Grant]:
        """Take in what a worker has seen of hosts, and that it needs others no more; returns what it may ask."""
        now = self._heard[worker] = self._clock()
        grants = {}
        for name in left:
            if name in self._hosts:
                self._ring(self._hosts[name].leave(worker))
        for name, report in reports.items():
            if name not in self._hosts:
                self._hosts[name] = Host(self._limits, now)
                self._hosts[name].cap(self._caps.get(name, FREE))
            grants[name], concerned = self._hosts[name].sync(worker, report, now)
            self._ring(concerned)
        if now - self._swept > 60.0:
            self._swept = now
            self._hosts = {name: host for name, host in self._hosts.items() if not host.idle(now)}
            for silent in [name for name, heard in self._heard.items() if now - heard > 60.0]:
                del self._heard[silent]
                self._bells.pop(silent, None)
        return grants

    async def rung(self, worker: str) -> None:
        """Return when there is news for a worker, or after some seconds."""
        bell = self._bells.setdefault(worker, asyncio.Event())
        await _happens(bell, _LONG_S)
        bell.clear()

    async def leave(self, worker: str) -> None:
        """A worker is done with every host."""
        for host in self._hosts.values():
            self._ring(host.leave(worker))
        self._bells.pop(worker, None)
        self._heard.pop(worker, None)

    async def cap(self, host: str, rate: float) -> None:
        """A host asks for no more than so many requests a second."""
        self._caps[host] = min(rate, self._caps.get(host, FREE))
        if host in self._hosts:
            self._ring(self._hosts[host].cap(rate))

    async def robots(self, site: str, worker: str) -> Robots | None:
        """What robots.txt of a site says; None: the worker is to fetch it, and to tell by `keep_robots`."""
        self._heard[worker] = self._clock()
        while True:
            known = self._sites.setdefault(site, _Site())
            self._sites.move_to_end(site)
            now = self._clock()
            if known.fetcher and now - self._heard.get(known.fetcher, now - _SILENT_S) < _SILENT_S:
                await _happens(known.told, 1.0)
            elif known.robots and now < known.until:
                return known.robots
            elif now < known.again:
                # Nobody reads it meanwhile, so there is nothing to be told.
                await asyncio.sleep(min(1.0, known.again - now))
            else:
                known.fetcher = worker
                known.told.clear()
                return None

    async def keep_robots(self, site: str, found: Robots) -> Robots | None:
        """What a worker was told to fetch; returns what holds now, or None where that is not known yet.

        One that cannot be read is tried again for `patience` seconds, which photos wait. One that was read holds on
        when a later reading fails.
        """
        known = self._sites.setdefault(site, _Site())
        now = self._clock()
        known.fetcher = ""
        if found.kind == "ok":
            known.robots, known.until, known.failures, known.heard = found, now + KEPT_S, 0, False
        elif known.robots and known.robots.kind == "ok":
            known.until = now + RETRY_S
        else:
            known.heard = known.heard or found.kind not in _NETWORK
            self._keep_failure(known, found, now)
        known.told.set()
        while len(self._sites) > _SITES:
            self._sites.popitem(last=False)
        return known.robots if now < known.until else None

    def _keep_failure(self, known: _Site, found: Robots, now: float) -> None:
        if not known.failures:
            known.since = now
        known.reason = found.reason
        left = known.since + self._limits.patience - now
        if not found.final and left > 0:
            # The last reading is at the very end.
            known.again = now + min(left, _LONGEST_WAIT_S, max(0.1, self._limits.backoff) * 2**known.failures)
        else:
            # Of a host that never said a word that is all that is to be known. Any other is up, and will be asked by
            # the next run.
            kind = "unasked" if known.heard and not found.final else found.kind
            known.robots, known.until = replace(found, kind=kind), now + RETRY_S
        known.failures = min(60, known.failures + 1)

    async def waits(self) -> dict[str, str]:
        """Why photos wait, by host, or by site where its robots.txt cannot be read."""
        now = self._clock()
        found = {name: why for name, host in self._hosts.items() if (why := host.wait(now))}
        for name, site in self._sites.items():
            if site.failures and site.again > now - _LONGEST_WAIT_S and not (site.robots and now < site.until):
                found[name] = f"robots.txt cannot be read: {site.reason}"
        return found

    def _ring(self, workers: Iterable[str]) -> None:
        for worker in workers:
            self._bells.setdefault(worker, asyncio.Event()).set()


async def _happens(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, but no longer than that; unlike `wait_for`, never swallows a cancellation."""
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([waiting], timeout=seconds)
    finally:
        waiting.cancel()


class RayBroker:
    """A broker that workers on any machine of a Ray cluster reach; it may be handed to them."""

    def __init__(self, limits: Limits) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Beside the driver: a machine that is lost takes workers with it, not the budgets.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = ray.remote(Broker).options(
            name=f"lavic-broker-{uuid.uuid4().hex[:12]}",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=10_000,
            scheduling_strategy=here,
        )
        self._actor: Any = actor.remote(limits)

    async def sync(self, worker: str, reports: dict[str, Report], left: list[str]) -> dict[str, Grant]:
        """See `Broker.sync`."""
        return await self._actor.sync.remote(worker, reports, left)

    async def rung(self, worker: str) -> None:
        """See `Broker.rung`."""
        await self._actor.rung.remote(worker)

    async def leave(self, worker: str) -> None:
        """See `Broker.leave`."""
        await self._actor.leave.remote(worker)

    async def cap(self, host: str, rate: float) -> None:
        """See `Broker.cap`."""
        await self._actor.cap.remote(host, rate)

    async def robots(self, site: str, worker: str) -> Robots | None:
        """See `Broker.robots`."""
        return await self._actor.robots.remote(site, worker)

    async def keep_robots(self, site: str, found: Robots) -> Robots | None:
        """See `Broker.keep_robots`."""
        return await self._actor.keep_robots.remote(site, found)

    def waits(self) -> Any:
        """See `Broker.waits`; returns a reference to the result."""
        return self._actor.waits.remote()
