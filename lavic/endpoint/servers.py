"""Servers of one model in turn, those that ask for a pause left out; and the pace of requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lavic.endpoint.faults import PAUSING, Fault, backoff_s


@dataclass(eq=False)
class Server:
    """One server."""

    url: str
    """Base address."""
    free_at: float = 0.0
    """When it takes requests again, on the monotonic clock."""
    faults: int = 0
    """In a row, of the kinds that pause it."""

    def pause(self, fault: Fault, first_backoff_s: float) -> None:
        """Sends nothing to a server that asks for a pause or does not accept connections for a while."""
        if fault.kind in PAUSING or fault.wait_s is not None:
            wait = backoff_s(first_backoff_s, self.faults) if fault.wait_s is None else fault.wait_s
            self.free_at = max(self.free_at, time.monotonic() + wait)
            self.faults += 1


class Servers:
    """Servers of one model, which take turns. Of one event loop.

    `requests_per_minute` limits all of them together; None: no limit.
    """

    def __init__(self, urls: Sequence[str], requests_per_minute: float | None) -> None:
        self._servers = [Server(url) for url in urls]
        self._turn = 0
        self._interval_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next_at = 0.0

    async def next(self, avoid: Server | None = None) -> Server:
        """The server of the next request, once it may be sent; `avoid`, where it failed, only if no other is free."""
        if self._interval_s:
            now = time.monotonic()
            send_at = max(now, self._next_at)
            self._next_at = send_at + self._interval_s
            await asyncio.sleep(send_at - now)
        while True:
            now = time.monotonic()
            turns = [self._servers[(self._turn + n) % len(self._servers)] for n in range(len(self._servers))]
            free = [server for server in turns if server.free_at <= now]
            if free:
                chosen = next((server for server in free if server is not avoid), free[0])
                self._turn = self._servers.index(chosen) + 1
                return chosen
            await asyncio.sleep(min(server.free_at for server in turns) - now)
