"""A crawl that cannot be run here, simulated event by event: host budgets, workers, stragglers, lost nodes.

    python benchmarks/crawl_simulation.py                 how 48 million photos would go, from crawls of 100,000
    python benchmarks/crawl_simulation.py --check         the simulation beside real crawls of a server on this machine

The model is that of `lavic crawl`. A worker takes one shard after the other and keeps `concurrency` requests in flight;
photos come in any order, at most `window` of a host being begun at a time, and are written in the shard's. A host is
asked at most so often and over so many connections, by all workers together. A worker checks one photo at a time. When
a node is lost, what its workers had of their unfinished shards is fetched again, by others.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import simpy


@dataclass(frozen=True, kw_only=True)
class Crawl:
    """A crawl and the web that it meets."""

    photos: int
    shard: int = 1000
    """Photos of a shard."""
    workers: int = 4
    """Shards that are made at once."""
    concurrency: int = 16
    """Requests in flight of a worker."""
    window: int = 1024
    """Photos of one host that are begun and not done; shards/pack/fetch_order.py has the same number."""
    hosts: int = 1
    """The photos are spread over them evenly."""
    rate: float = math.inf
    """Requests a second to one host, by all workers."""
    connections: int = 1 << 30
    """Requests at once to one host, by all workers."""
    serves: float = math.inf
    """Answers a second that a host gives at most; more requests wait at its door."""
    latency: float = 0.1
    """Seconds of an answer, the median."""
    spread: float = 0.0
    """Standard deviation of its logarithm."""
    stragglers: float = 0.0
    """Share of answers that take `straggler_s` instead."""
    straggler_s: float = 0.0
    check_s: float = 0.0
    """Seconds of a core to check one photo."""
    start_s: float = 0.0
    """Seconds before a shard's first request."""
    nodes: int = 1
    """The workers are spread over them evenly."""
    mtbf_h: float = math.inf
    """Hours until a node is lost, on average."""
    back_s: float = 600.0
    """Seconds until another node takes its place."""
    losses: tuple[tuple[float, int], ...] = ()
    """Or exactly these: (second, node)."""
    seed: int = 0


@dataclass
class Outcome:
    """What came of it."""

    seconds: float = 0.0
    """From the first request to the last photo written."""
    requests: int = 0
    """Those of lost shards too."""
    lost: int = 0
    """Nodes."""
    idle_s: float = 0.0
    """Seconds at the end in which a worker had nothing left to do: the tail."""
    photos: int = 0

    @property
    def rate(self) -> float:
        """Photos a second."""
        return self.photos / self.seconds


@dataclass
class _Attempt:
    """One worker at one shard."""

    numbers: range
    over: simpy.Event
    """Ends with whether the shard is whole."""
    done: list[simpy.Event] = field(default_factory=list)

    @property
    def dead(self) -> bool:
        return self.over.triggered


class _Host:
    """Gives leave to ask, and answers."""

    def __init__(self, env: simpy.Environment, crawl: Crawl) -> None:
        self.env, self.crawl = env, crawl
        self.connections = simpy.Resource(env, capacity=crawl.connections)
        self._leave = self._answer = 0.0

    def leave(self) -> simpy.Event:
        """Happens when the next request may go out."""
        at = max(self.env.now, self._leave)
        self._leave = at + 1 / self.crawl.rate
        return self.env.timeout(at - self.env.now)

    def answer(self, seconds: float) -> simpy.Event:
        """Happens when an answer that takes so long by itself is there."""
        at = max(self.env.now, self._answer)
        self._answer = at + 1 / self.crawl.serves
        return self.env.timeout(at - self.env.now + seconds)


class _Run:
    def __init__(self, crawl: Crawl) -> None:
        self.crawl, self.env, self.outcome = crawl, simpy.Environment(), Outcome(photos=crawl.photos)
        self.hosts = [_Host(self.env, crawl) for _ in range(crawl.hosts)]
        self.todo = [range(at, min(at + crawl.shard, crawl.photos)) for at in range(0, crawl.photos, crawl.shard)]
        self.left = len(self.todo)
        self.whole = self.env.event()
        self.more = self.env.event()
        self.up = [True] * crawl.nodes
        self.attempts: dict[int, _Attempt] = {}
        self.ran_dry = math.inf
        self.first = math.inf

    def run(self) -> Outcome:
        for worker in range(self.crawl.workers):
            self.env.process(self._worker(worker))
        for node in range(self.crawl.nodes):
            self.env.process(self._node(node))
        for second, node in self.crawl.losses:
            self.env.process(self._lose_at(second, node))
        self.env.run(until=self.whole)
        self.outcome.seconds = self.env.now - self.first
        self.outcome.idle_s = max(0.0, self.env.now - self.ran_dry)
        return self.outcome

    def _worker(self, worker: int) -> Generator[simpy.Event, Any, None]:
        node = worker % self.crawl.nodes
        checker = simpy.Resource(self.env)
        while not self.whole.triggered:
            if not self.up[node] or not self.todo:
                if not self.todo:
                    self.ran_dry = min(self.ran_dry, self.env.now)
                yield self.more
                continue
            numbers = self.todo.pop(0)
            attempt = self.attempts[worker] = _Attempt(numbers, self.env.event())
            self.env.process(self._shard(attempt, checker))
            whole = yield attempt.over
            del self.attempts[worker]
            if whole:
                self.left -= 1
                if not self.left:
                    self.whole.succeed()
            else:
                self.todo.append(numbers)
                self.ran_dry = math.inf
                self._wake()

    def _shard(self, attempt: _Attempt, checker: simpy.Resource) -> Generator[simpy.Event, Any, None]:
        yield self.env.timeout(self.crawl.start_s)
        gate = simpy.Resource(self.env, capacity=self.crawl.concurrency)
        windows = [simpy.Resource(self.env, capacity=self.crawl.window) for _ in self.hosts]
        for place, number in enumerate(attempt.numbers):
            attempt.done.append(self.env.event())
            self.env.process(self._photo(attempt, place, number, gate, windows[number % len(windows)], checker))
        for event in attempt.done:
            yield event | attempt.over
            if attempt.dead:
                return
        attempt.over.succeed(True)

    def _photo(
        self,
        attempt: _Attempt,
        place: int,
        number: int,
        gate: simpy.Resource,
        window: simpy.Resource,
        checker: simpy.Resource,
    ) -> Generator[simpy.Event, Any, None]:
        host = self.hosts[number % len(self.hosts)]
        with window.request() as begun:
            yield begun
            with gate.request() as mine:
                yield mine
                with host.connections.request() as connection:
                    yield connection
                    if attempt.dead:
                        return
                    yield host.leave()
                    if attempt.dead:
                        return
                    self.first = min(self.first, self.env.now)
                    self.outcome.requests += 1
                    yield host.answer(seconds_of(self.crawl, number))
                if self.crawl.check_s and not attempt.dead:
                    with checker.request() as core:
                        yield core
                        yield self.env.timeout(self.crawl.check_s)
        attempt.done[place].succeed()

    def _node(self, node: int) -> Generator[simpy.Event, Any, None]:
        draw = random.Random(f"{self.crawl.seed} node {node}")
        while math.isfinite(self.crawl.mtbf_h):
            yield self.env.timeout(draw.expovariate(1 / (3600 * self.crawl.mtbf_h)))
            yield from self._lose(node)

    def _lose_at(self, second: float, node: int) -> Generator[simpy.Event, Any, None]:
        yield self.env.timeout(second)
        yield from self._lose(node)

    def _lose(self, node: int) -> Generator[simpy.Event, Any, None]:
        self.up[node] = False
        self.outcome.lost += 1
        for worker, attempt in list(self.attempts.items()):
            if worker % self.crawl.nodes == node and not attempt.dead:
                attempt.over.succeed(False)
        yield self.env.timeout(self.crawl.back_s)
        self.up[node] = True
        self._wake()

    def _wake(self) -> None:
        self.more, news = self.env.event(), self.more
        news.succeed()


def seconds_of(crawl: Crawl, number: int) -> float:
    """How long the answer for a photo takes; the check's server answers by the same rule."""
    draw = random.Random(f"{crawl.seed} photo {number}")
    if draw.random() < crawl.stragglers:
        return crawl.straggler_s
    return crawl.latency * math.exp(crawl.spread * draw.gauss(0, 1)) if crawl.spread else crawl.latency


def simulate(crawl: Crawl) -> Outcome:
    """Runs a crawl in simulated time."""
    return _Run(crawl).run()


BASE = Crawl(
    photos=100_000,
    shard=5000,
    workers=4,
    concurrency=16,
    rate=50.0,
    connections=24,
    latency=0.12,
    spread=0.5,
    stragglers=0.002,
    straggler_s=30.0,
    check_s=0.004,
    start_s=2.0,
)
"""One host that is asked as `lavic crawl` does by default, with the settings of configs/crawl-amazon-2023.yaml."""

CASES: dict[str, Crawl] = {
    "as configured: 50 requests a second to the host": BASE,
    "twice the workers": replace(BASE, workers=8),
    "the host's owner allows 500 a second and 256 connections": replace(BASE, rate=500.0, connections=256),
    "and 16 workers": replace(BASE, rate=500.0, connections=256, workers=16),
    "and only 64 photos begun at a time": replace(BASE, rate=500.0, connections=256, workers=16, window=64),
    "or no stragglers": replace(BASE, rate=500.0, connections=256, workers=16, stragglers=0.0),
    "ten hosts at 50 each, 16 workers": replace(BASE, hosts=10, workers=16),
    "16 workers on 4 spot nodes, each lost every 15 minutes": replace(
        BASE, rate=500.0, connections=256, workers=16, nodes=4, mtbf_h=0.25, back_s=120.0
    ),
    "the same, 500 photos to a shard": replace(
        BASE, rate=500.0, connections=256, workers=16, nodes=4, mtbf_h=0.25, back_s=120.0, shard=500
    ),
}


def main(argv: Sequence[str]) -> int:
    """Prints one line for each case; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with real crawls of a server on this machine")
    parser.add_argument("--photos", type=int, default=BASE.photos, help="of each simulated crawl")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    chosen = parser.parse_args(argv)
    if chosen.check:
        from crawl_check import check

        rows = check()
    else:
        rows = []
        for name, crawl in CASES.items():
            outcome = simulate(replace(crawl, photos=chosen.photos))
            wasted = outcome.requests / outcome.photos - 1
            rows.append({"case": name, **asdict(outcome), "rate": outcome.rate, "wasted": wasted})
            print(
                f"{name:<60} {outcome.rate:7.1f} photos/s  tail {outcome.idle_s:6.1f} s  "
                f"{outcome.lost:3} nodes lost  {wasted:5.1%} fetched twice",
                flush=True,
            )
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
