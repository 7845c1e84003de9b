"""A worker's permits for one host.

Without a limit, a permit costs a comparison of numbers; otherwise it is a time slot that the coordinator has granted.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from lavic.shards.pack.outcomes import Kind
from lavic.shards.ratelimit.host_limiter import Grant, HostReport

Verdict = Literal["success", "failed", "unreachable", "throttled", "unknown"]
"""What the result of a request shows about its host: `failed` with a connection to it, `unreachable` without."""

_IDLE_S = 5.0
_LATE_S = 0.25
"""Older slots expire, so that a delayed worker does not send a burst."""
_PROBES = 8
"""Photos of a shard that are still requested from a host that is given up."""
_SLOW_S = 1.0
"""A host with more seconds than this between two requests is slow."""
_LONG_PAUSE_S = 5.0
"""A host that is paused for longer than this is slow too."""
_GOLDEN = 0.618034
"""The golden ratio: its multiples modulo 1 are spread evenly."""


class HostUnavailable(Exception):
    """A host that is paused for longer than `patience`."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class InFlightLimit:
    """The limit of this worker's requests in flight, over all hosts."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self.processing = 0
        """Responses that are being processed."""
        self._blocked: dict[HostClient, None] = {}

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Counts a response that is being processed as in flight, so that fetching does not run ahead of processing."""
        self.free -= 1
        self.processing += 1
        try:
            yield
        finally:
            self.free += 1
            self.processing -= 1
            self.dispatch()

    def enqueue(self, client: HostClient) -> None:
        """Registers a host whose requests wait only for this limit."""
        self._blocked.setdefault(client)

    def dispatch(self) -> None:
        """Dispatches waiting hosts in turn, as long as the limit allows."""
        while self.free > 0 and self._blocked:
            client = next(iter(self._blocked))
            del self._blocked[client]
            client.dispatch()


class HostClient:
    """This worker's permits for one host; `request_sync` is called to request a sync with the coordinator."""

    def __init__(self, request_sync: Callable[[], None], in_flight: InFlightLimit | None = None) -> None:
        self._request_sync = request_sync
        self._limit = in_flight or InFlightLimit(1 << 30)
        self.version = -1
        self.answered = False
        """Whether the host has answered a request of any worker."""
        self.last_used = time.monotonic()
        self._in_flight = self._connections = self._slots = 0
        self._unlimited = self._give_up = self._stopped = self._over_share = self._scatter = self._probe = False
        self._probes = self._picks = self._refusals = 0
        self._next_slot = self._interval = self._pace = 0.0
        self._paused_until = 0.0
        self._pause_reason: tuple[Kind, str] = ("ok", "")
        self._waiting: deque[tuple[asyncio.Future[None], bool]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._seen = HostReport()

    async def acquire(self, fresh: bool = True, retry: bool = False) -> int:
        """Waits for a permit to send a request; returns the version for `release`.

        Args:
            fresh: The photo was not requested before.
            retry: It is a retry, which goes before others, because its result shows the state of the host.

        Raises:
            HostUnavailable: The host is paused for longer than `patience`.
        """
        if not (self._unlimited and self._in_flight < self._connections and self._limit.free > 0 and not self._waiting):
            waiting = asyncio.get_running_loop().create_future()
            (self._waiting.appendleft if retry else self._waiting.append)((waiting, fresh))
            try:
                self.dispatch()
                await waiting
            except BaseException:
                if waiting.done() and not waiting.cancelled() and not waiting.exception():
                    self._in_flight -= 1
                    self._limit.free += 1
                    self._finish()
                raise
            return self.version
        self._in_flight += 1
        self._limit.free -= 1
        self._seen.sent += 1
        return self.version

    def release(
        self,
        version: int,
        verdict: Verdict,
        kind: Kind = "ok",
        reason: str = "",
        retry_after: float = 0.0,
        fresh: bool = True,
        refused: int = -1,
    ) -> None:
        """Returns a permit with the result of its request, and the kind and reason of a failure.

        `version` is that of `acquire`, `refused` the one under which the photo was refused before. `retry_after`: the
        seconds that the host asks to wait. `fresh`: the photo was not requested before.
        """
        self._in_flight -= 1
        self._limit.free += 1
        seen = self._seen
        if verdict == "throttled":
            # A single refusal may be due to the photo; a Retry-After is always about the host.
            self._refusals += fresh
            seen.retry_after = max(seen.retry_after, retry_after)
            if retry_after or (fresh and self._refusals > 1):
                self._stop(retry_after)
            if version == self.version:
                seen.throttled += fresh
            self._request_sync()
        elif version == self.version:
            if verdict == "success":
                seen.successes += 1
                if refused == self.version:
                    seen.recovered += 1
                    self._request_sync()
                seen.failures = seen.connect_failures = self._refusals = self._probes = 0
                if self._pause_reason[0] != "ok":
                    # The host is back.
                    self._request_sync()
            elif verdict == "failed":
                seen.failures += fresh
                seen.kind, seen.reason = kind, reason
                self._request_sync()
            elif verdict == "unreachable":
                seen.connect_failures += 1
                seen.kind, seen.reason = kind, reason
                self._request_sync()
        self._finish()
        if self._over_share and self._in_flight <= self._connections:
            # Other workers may wait for the connections above this worker's share.
            self._over_share = False
            self._request_sync()

    def report(self) -> HostReport:
        """Returns the counts since the last report, and resets them."""
        self._waiting = deque(waiting for waiting in self._waiting if not waiting[0].done())
        seen, self._seen, self._stopped = self._seen, HostReport(), False
        seen.version, seen.in_flight = self.version, self._in_flight
        # Request more slots only when all are used, because new slots replace the remaining ones.
        seen.waiting = 0 if self._slots else min(len(self._waiting), self._limit.size)
        if self._waiting or seen.in_flight or seen.sent:
            self.last_used = time.monotonic()
        return seen

    def apply(self, grant: Grant) -> None:
        """Applies a grant of the coordinator."""
        now = time.monotonic()
        if grant.version != self.version:
            self._slots = 0
            self._seen = HostReport(sent=self._seen.sent, retry_after=self._seen.retry_after)
        self.version, self._connections = grant.version, grant.connections
        self.answered = self.answered or grant.answered
        self._over_share = self._in_flight > self._connections
        if self._stopped:
            # The grant is older than the host's refusal.
            return
        self._unlimited = grant.unlimited
        if grant.slots:
            self._slots, self._next_slot, self._interval = grant.slots, now + grant.start, grant.interval
        if not grant.pause:
            self._pace = grant.interval
        self._paused_until, self._give_up = now + grant.pause, grant.give_up
        self._pause_reason = (grant.kind, grant.reason)
        self._scatter, self._probe = grant.scatter, grant.probe
        if not grant.probe:
            self._probes = 0
        self.dispatch()

    def pause(self) -> None:
        """Stops requests until the next grant, because the limits have changed."""
        self._stop(0.0)
        self._request_sync()

    def fail_waiting(self, error: Exception) -> None:
        """Raises an error in every waiting `acquire`."""
        while self._waiting:
            if not (waiting := self._waiting.popleft()[0]).done():
                waiting.set_exception(error)

    @property
    def idle(self) -> bool:
        """Whether it is unused for some seconds."""
        return not self._waiting and not self._in_flight and time.monotonic() - self.last_used > _IDLE_S

    @property
    def slow(self) -> bool:
        """Whether there are seconds between two requests to the host, or it is in a long pause."""
        return self._pace > _SLOW_S or time.monotonic() + _LONG_PAUSE_S < self._paused_until

    @property
    def busy(self) -> bool:
        """Whether requests are in flight or waiting."""
        return self._in_flight > 0 or any(not waiting.done() for waiting, _ in self._waiting)

    def dispatch(self) -> None:
        """Gives permits to waiting requests, as far as possible."""
        while self._waiting:
            if self._waiting[0][0].done():
                self._waiting.popleft()
                continue
            now = time.monotonic()
            if now < self._paused_until:
                if self._give_up:
                    return self.fail_waiting(HostUnavailable(*self._pause_reason))
                return self._later(self._paused_until - now)
            if self.version < 0:
                return self._request_sync()
            if self._probe and self._probes >= _PROBES:
                # A request in flight may show that the host is back.
                return None if self._in_flight else self.fail_waiting(HostUnavailable(*self._pause_reason))
            if self._in_flight >= self._connections:
                return None
            if self._limit.free <= 0:
                return self._limit.enqueue(self)
            if not self._unlimited:
                while self._slots > 1 and self._next_slot < now - _LATE_S:
                    self._slots, self._next_slot = self._slots - 1, self._next_slot + self._interval
                if not self._slots:
                    return self._request_sync()
                if self._next_slot > now:
                    return self._later(self._next_slot - now)
                self._slots, self._next_slot = self._slots - 1, self._next_slot + self._interval
            self._in_flight += 1
            self._limit.free -= 1
            self._seen.sent += 1
            self._probes += self._probe
            self._pick().set_result(None)
        return None

    def _pick(self) -> asyncio.Future[None]:
        """The next request; for a failing host one far from the last in the queue, new photos first."""
        if not self._scatter:
            return self._waiting.popleft()[0]
        indices = [n for n, (waiting, fresh) in enumerate(self._waiting) if fresh and not waiting.done()]
        indices = indices or [n for n, (waiting, _) in enumerate(self._waiting) if not waiting.done()]
        self._picks += 1
        index = indices[int(self._picks * _GOLDEN % 1 * len(indices))]
        picked = self._waiting[index][0]
        del self._waiting[index]
        return picked

    def _finish(self) -> None:
        """Dispatches waiting requests, of this host and others, after a request has ended."""
        if self._waiting:
            self._limit.enqueue(self)
        self._limit.dispatch()

    def _stop(self, seconds: float) -> None:
        """Pauses immediately, before the coordinator knows."""
        self._unlimited, self._slots, self._stopped = False, 0, True
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def _later(self, seconds: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self.dispatch)
