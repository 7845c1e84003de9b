"""A worker's side of the hosts' budgets: each request asks leave here, and what came of it is told here.

Where no limit is hit, leave is a comparison of numbers. What has to be asked is asked for all hosts at once, by one
task beside the requests, and a host that asks for less is heard of as soon as one worker knows.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, Protocol

from lavic.shards.http.robots import Robots
from lavic.shards.pack.outcomes import Kind
from lavic.shards.ratelimit.host_limiter import Grant, Report

Verdict = Literal["well", "failed", "unreached", "throttled", "void"]
"""What a request says of its host: `failed` with a connection to it, `unreached` without; `void` is nothing."""

_HEARTBEAT_S = 2.0
_IDLE_S = 5.0
_LATE_S = 0.25
"""A slot that is older is given up: a worker that was held up does not make up for it in one burst."""
_LOST_S = 30.0
_PROBES = 8
"""Photos of a shard that are asked of a host that is given up."""
_SLOW_S = 1.0
"""A host that lets so much time pass between two requests is slow."""
_LONG_S = 5.0
"""And so is one that is left alone for so long."""
_GOLDEN = 0.618034
"""Multiples of it, modulo 1, lie far from each other."""


class Office(Protocol):
    """Where the budgets are kept: a `Broker`, in this process or behind Ray."""

    async def sync(self, worker: str, reports: dict[str, Report], left: list[str]) -> dict[str, Grant]:
        """Report on hosts, take leave of others, and be granted."""

    async def rung(self, worker: str) -> None:
        """Return when there is news for a worker, or after some seconds."""

    async def leave(self, worker: str) -> None:
        """The worker is done."""

    async def cap(self, host: str, rate: float) -> None:
        """The host asks for no more than so many requests a second."""

    async def robots(self, site: str, worker: str) -> Robots | None:
        """What robots.txt of a site says; None: the worker is to fetch it and to tell."""

    async def keep_robots(self, site: str, found: Robots) -> Robots | None:
        """Tell what came of that; returns what holds now. None: nothing yet, ask `robots` again."""


class HostClosed(Exception):
    """A host that is not asked for now, for longer than anybody waits."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Room:
    """How many requests this worker may have in flight, to all hosts together."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self.kept = 0
        """Places of answers that are worked on."""
        self._blocked: dict[Lane, None] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep a request's place while its answer is worked on: no more are brought than can be dealt with."""
        self.free -= 1
        self.kept += 1
        try:
            yield
        finally:
            self.free += 1
            self.kept -= 1
            self.pump()

    def wait(self, lane: Lane) -> None:
        """A lane has requests that wait for room alone."""
        self._blocked.setdefault(lane)

    def pump(self) -> None:
        """Let lanes use what is free, each in its turn."""
        while self.free > 0 and self._blocked:
            lane = next(iter(self._blocked))
            del self._blocked[lane]
            lane.pump()


class Lane:
    """The way of this worker's requests to one host."""

    def __init__(self, ask: Callable[[], None], room: Room | None = None) -> None:
        self._ask = ask
        self._room = room or Room(1 << 30)
        self.version = -1
        self.answered = False
        """The host has answered, to this worker or to another."""
        self.used = time.monotonic()
        self._in_flight = self._connections = self._slots = 0
        self._free = self._give_up = self._stopped = self._over = self._scatter = self._probe = False
        self._probes = self._picks = self._refusals = 0
        self._start = self._interval = self._pace = 0.0
        self._closed_until = 0.0
        self._why: tuple[Kind, str] = ("ok", "")
        self._waiting: deque[tuple[asyncio.Future[None], bool]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._seen = Report()

    async def enter(self, fresh: bool = True, again: bool = False) -> int:
        """Wait for leave to send one request; returns the version to `leave` with.

        Args:
            fresh: It is for a photo that was not asked for before.
            again: It is a further try, which goes before others: what comes of it tells about the host of now.

        Raises:
            HostClosed: The host is not asked for longer than anybody waits.
        """
        if not (self._free and self._in_flight < self._connections and self._room.free > 0 and not self._waiting):
            waiting = asyncio.get_running_loop().create_future()
            (self._waiting.appendleft if again else self._waiting.append)((waiting, fresh))
            try:
                self.pump()
                await waiting
            except BaseException:
                if waiting.done() and not waiting.cancelled() and not waiting.exception():
                    self._in_flight -= 1
                    self._room.free += 1
                    self._next()
                raise
            return self.version
        self._in_flight += 1
        self._room.free -= 1
        self._seen.sent += 1
        return self.version

    def leave(
        self,
        version: int,
        verdict: Verdict,
        kind: Kind = "ok",
        reason: str = "",
        retry_after: float = 0.0,
        fresh: bool = True,
        refused: int = -1,
    ) -> None:
        """Tell what came of a request.

        Args:
            version: Under which it was sent.
            verdict: What it says of the host.
            kind: Of the failure.
            reason: Of the failure.
            retry_after: Seconds that the host asks for.
            fresh: The photo was not asked for before.
            refused: Under which version it was refused before.
        """
        self._in_flight -= 1
        self._room.free += 1
        seen = self._seen
        if verdict == "throttled":
            # A single refusal among good answers may be the photo's own. What the host asks for itself always counts.
            self._refusals += fresh
            seen.retry_after = max(seen.retry_after, retry_after)
            if retry_after or (fresh and self._refusals > 1):
                self._stop(retry_after)
            if version == self.version:
                seen.throttled += fresh
            self._ask()
        elif version == self.version:
            if verdict == "well":
                seen.well += 1
                if refused == self.version:
                    seen.passed += 1
                    self._ask()
                seen.failed = seen.unreached = self._refusals = self._probes = 0
                if self._why[0] != "ok":
                    # It was given up for a while, and here it is again.
                    self._ask()
            elif verdict == "failed":
                seen.failed += fresh
                seen.kind, seen.reason = kind, reason
                self._ask()
            elif verdict == "unreached":
                seen.unreached += 1
                seen.kind, seen.reason = kind, reason
                self._ask()
        self._next()
        if self._over and self._in_flight <= self._connections:
            # Others may wait for what it held above its part.
            self._over = False
            self._ask()

    def report(self) -> Report:
        """What was seen since the last report."""
        self._waiting = deque(waiting for waiting in self._waiting if not waiting[0].done())
        seen, self._seen, self._stopped = self._seen, Report(), False
        seen.version, seen.in_flight = self.version, self._in_flight
        # Slots are asked for when those at hand are spent: new ones take their place.
        seen.wanted = 0 if self._slots else min(len(self._waiting), self._room.size)
        if self._waiting or seen.in_flight or seen.sent:
            self.used = time.monotonic()
        return seen

    def take(self, grant: Grant) -> None:
        """Go by what was granted."""
        now = time.monotonic()
        if grant.version != self.version:
            self._slots = 0
            self._seen = Report(sent=self._seen.sent, retry_after=self._seen.retry_after)
        self.version, self._connections = grant.version, grant.connections
        self.answered = self.answered or grant.answered
        self._over = self._in_flight > self._connections
        if self._stopped:
            # It was granted before the host complained.
            return
        self._free = grant.free
        if grant.slots:
            self._slots, self._start, self._interval = grant.slots, now + grant.start, grant.interval
        if not grant.closed:
            self._pace = grant.interval
        self._closed_until, self._give_up = now + grant.closed, grant.give_up
        self._why = (grant.kind, grant.reason)
        self._scatter, self._probe = grant.scatter, grant.probe
        if not grant.probe:
            self._probes = 0
        self.pump()

    def wait(self) -> None:
        """Send no more until the budget has told its news, which is there already."""
        self._stop(0.0)
        self._ask()

    def fail(self, error: Exception) -> None:
        """End whoever waits."""
        while self._waiting:
            if not (waiting := self._waiting.popleft()[0]).done():
                waiting.set_exception(error)

    @property
    def idle(self) -> bool:
        """Nobody has used it for a while."""
        return not self._waiting and not self._in_flight and time.monotonic() - self.used > _IDLE_S

    @property
    def slow(self) -> bool:
        """The host lets seconds pass between two requests."""
        return self._pace > _SLOW_S or time.monotonic() + _LONG_S < self._closed_until

    @property
    def busy(self) -> bool:
        """Requests are in flight or wait."""
        return self._in_flight > 0 or any(not waiting.done() for waiting, _ in self._waiting)

    def pump(self) -> None:
        """Let go whoever may."""
        while self._waiting:
            if self._waiting[0][0].done():
                self._waiting.popleft()
                continue
            now = time.monotonic()
            if now < self._closed_until:
                if self._give_up:
                    return self.fail(HostClosed(*self._why))
                return self._later(self._closed_until - now)
            if self.version < 0:
                return self._ask()
            if self._probe and self._probes >= _PROBES:
                # One of those in flight may show that the host is back.
                return None if self._in_flight else self.fail(HostClosed(*self._why))
            if self._in_flight >= self._connections:
                return None
            if self._room.free <= 0:
                return self._room.wait(self)
            if not self._free:
                while self._slots > 1 and self._start < now - _LATE_S:
                    self._slots, self._start = self._slots - 1, self._start + self._interval
                if not self._slots:
                    return self._ask()
                if self._start > now:
                    return self._later(self._start - now)
                self._slots, self._start = self._slots - 1, self._start + self._interval
            self._in_flight += 1
            self._room.free -= 1
            self._seen.sent += 1
            self._probes += self._probe
            self._pick().set_result(None)
        return None

    def _pick(self) -> asyncio.Future[None]:
        """Whose turn it is; of a host that is suspected somebody far from the last, new photos first."""
        if not self._scatter:
            return self._waiting.popleft()[0]
        places = [n for n, (waiting, fresh) in enumerate(self._waiting) if fresh and not waiting.done()]
        places = places or [n for n, (waiting, _) in enumerate(self._waiting) if not waiting.done()]
        self._picks += 1
        place = places[int(self._picks * _GOLDEN % 1 * len(places))]
        picked = self._waiting[place][0]
        del self._waiting[place]
        return picked

    def _next(self) -> None:
        """A request has ended: this lane and those that wait for room take their turns."""
        if self._waiting:
            self._room.wait(self)
        self._room.pump()

    def _stop(self, seconds: float) -> None:
        """At once, before the budget has heard of it."""
        self._free, self._slots, self._stopped = False, 0, True
        self._closed_until = max(self._closed_until, time.monotonic() + seconds)

    def _later(self, seconds: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self.pump)


class Lanes:
    """The lanes of one worker, and its talk with the office."""

    def __init__(self, office: Office, requests: int) -> None:
        self.office = office
        self.room = Room(requests)
        self.worker = uuid.uuid4().hex
        self._lanes: dict[str, Lane] = {}
        self._news = asyncio.Event()
        self._lost: Exception | None = None

    async def __aenter__(self) -> Lanes:
        self._tasks = [asyncio.create_task(self._talk()), asyncio.create_task(self._listen())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(Exception):
            await self.office.sync(self.worker, {name: lane.report() for name, lane in self._lanes.items()}, [])
            await self.office.leave(self.worker)

    def to(self, host: str) -> Lane:
        """The lane to a host.

        Raises:
            RuntimeError: The office cannot be reached any more.
        """
        if self._lost:
            raise RuntimeError("the crawl's budgets cannot be reached") from self._lost
        lane = self._lanes.get(host)
        if lane is None:
            lane = self._lanes[host] = Lane(self._news.set, self.room)
        return lane

    @property
    def busy(self) -> bool:
        """Requests are in flight or wait."""
        return any(lane.busy for lane in self._lanes.values())

    @property
    def slow(self) -> bool:
        """Requests wait, and all of them for slow hosts."""
        busy = [lane for lane in self._lanes.values() if lane.busy]
        return bool(busy) and all(lane.slow for lane in busy)

    async def _talk(self) -> None:
        since = time.monotonic()
        while True:
            # Not `wait_for`, which may swallow the cancellation that ends this.
            heartbeat = asyncio.get_running_loop().call_later(_HEARTBEAT_S, self._news.set)
            await self._news.wait()
            heartbeat.cancel()
            self._news.clear()
            left = [name for name, lane in self._lanes.items() if lane.idle]
            for name in left:
                del self._lanes[name]
            reports = {name: lane.report() for name, lane in self._lanes.items()}
            try:
                grants = await self.office.sync(self.worker, reports, left)
                since = time.monotonic()
            except Exception as error:
                # Whoever keeps the budgets may be on its way back; without them nothing is sent.
                if time.monotonic() - since > _LOST_S:
                    self._lost = error
                    for lane in self._lanes.values():
                        lane.fail(RuntimeError("the crawl's budgets cannot be reached"))
                    return
                await asyncio.sleep(1.0)
                continue
            for name, grant in grants.items():
                self._lanes[name].take(grant)

    async def _listen(self) -> None:
        while True:
            try:
                await self.office.rung(self.worker)
            except Exception:
                await asyncio.sleep(1.0)
            self._news.set()
