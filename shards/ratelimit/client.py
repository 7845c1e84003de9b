"""A worker's side of the rate limits: every request acquires a permit for its host and releases it with a result.

A background task agrees on the limits of all hosts with the coordinator, and reports immediately when a host asks for
fewer requests.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import suppress
from typing import Protocol

from lavic.shards.http.robots import Robots
from lavic.shards.ratelimit.host_client import HostClient, InFlightLimit
from lavic.shards.ratelimit.host_limiter import Grant, HostReport

_HEARTBEAT_S = 2.0
_LOST_S = 30.0
_COORDINATOR_LOST = "the coordinator of the crawl's rate limits cannot be reached"


class CoordinatorHandle(Protocol):
    """A `Coordinator` in this process, behind a pipe or behind Ray; its methods are described there."""

    async def sync(self, worker: str, reports: dict[str, HostReport], idle: list[str]) -> dict[str, Grant]: ...
    async def wait_for_change(self, worker: str) -> None: ...
    async def remove_worker(self, worker: str) -> None: ...
    async def limit_rate(self, host: str, rate: float) -> None: ...
    async def get_robots(self, site: str, worker: str) -> Robots | None: ...
    async def put_robots(self, site: str, robots: Robots) -> Robots | None: ...


class RateLimitClient:
    """The permits of one worker for all hosts, with at most `requests` in flight: an async context manager."""

    def __init__(self, coordinator: CoordinatorHandle, requests: int) -> None:
        self.coordinator = coordinator
        self.in_flight = InFlightLimit(requests)
        self.worker = uuid.uuid4().hex
        self._hosts: dict[str, HostClient] = {}
        self._wake = asyncio.Event()
        self._lost: Exception | None = None

    async def __aenter__(self) -> RateLimitClient:
        self._tasks = [asyncio.create_task(self._sync()), asyncio.create_task(self._watch())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(Exception):
            await self.coordinator.sync(self.worker, {name: host.report() for name, host in self._hosts.items()}, [])
            await self.coordinator.remove_worker(self.worker)

    def host(self, name: str) -> HostClient:
        """The permits for a host.

        Raises:
            RuntimeError: The coordinator is lost.
        """
        if self._lost:
            raise RuntimeError(_COORDINATOR_LOST) from self._lost
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = HostClient(self._wake.set, self.in_flight)
        return host

    @property
    def busy(self) -> bool:
        """Whether requests are in flight or waiting."""
        return any(host.busy for host in self._hosts.values())

    @property
    def slow(self) -> bool:
        """Whether requests are in flight or waiting, all of them for slow hosts."""
        busy = [host for host in self._hosts.values() if host.busy]
        return bool(busy) and all(host.slow for host in busy)

    async def _sync(self) -> None:
        since = time.monotonic()
        while True:
            # Not `wait_for`, which may swallow the cancellation of this task.
            heartbeat = asyncio.get_running_loop().call_later(_HEARTBEAT_S, self._wake.set)
            await self._wake.wait()
            heartbeat.cancel()
            self._wake.clear()
            idle = [name for name, host in self._hosts.items() if host.idle]
            for name in idle:
                del self._hosts[name]
            reports = {name: host.report() for name, host in self._hosts.items()}
            try:
                grants = await self.coordinator.sync(self.worker, reports, idle)
                since = time.monotonic()
            except Exception as error:
                # The coordinator may be restarting; nothing is sent meanwhile.
                if time.monotonic() - since > _LOST_S:
                    self._lost = error
                    for host in self._hosts.values():
                        host.fail_waiting(RuntimeError(_COORDINATOR_LOST))
                    return
                await asyncio.sleep(1.0)
                continue
            for name, grant in grants.items():
                self._hosts[name].apply(grant)

    async def _watch(self) -> None:
        while True:
            try:
                await self.coordinator.wait_for_change(self.worker)
            except Exception:
                await asyncio.sleep(1.0)
            self._wake.set()
