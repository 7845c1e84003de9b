"""Heartbeats: what each rank publishes about itself for the others, and how a report shows them."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from lavic.distributed.context import DistributedContext

_REPORTS = "reports"
_STACK_DEPTH = 12
"""Innermost calls of a Python stack that are reported."""
_servers: list[Any] = []
"""Store servers of this process: the other ranks use them until this process ends."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The state of a rank, as it last published it."""

    host: str
    position: int
    """Places it has reached: the ranks with fewer are behind."""
    place: str
    since: float
    """Seconds it has been at `place`."""
    beat: int
    """Increases as long as the process lives."""
    error: str = ""
    """Why it ended."""
    answered: int = 0
    """Number of the last report that it has published its stack for."""
    stack: str = ""
    """Its main thread's Python stack at that time."""


class HeartbeatStore:
    """A key-value store of rank 0 that all ranks publish to, apart from the process group. Collective to make."""

    def __init__(self, world: DistributedContext) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._world = world
        timeout, host = timedelta(seconds=30), os.environ["MASTER_ADDR"]
        server = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if world.is_main else None
        if server:
            _servers.append(server)
        port = world.broadcast_object(server.port if server else 0)
        self._store = server or TCPStore(host, port, is_master=False, timeout=timeout)
        self._store.add(_REPORTS, 0)

    def publish(self, heartbeat: Heartbeat) -> None:
        """Publishes this rank's state."""
        self._store.set(f"rank {self._world.rank}", json.dumps(asdict(heartbeat)))

    def get(self, rank: int) -> Heartbeat:
        """A rank's state. Raises RuntimeError where rank 0 is gone."""
        return Heartbeat(**json.loads(self._store.get(f"rank {rank}")))

    def get_all(self) -> dict[int, Heartbeat]:
        """The state of every rank."""
        return {rank: self.get(rank) for rank in range(self._world.size)}

    def request_report(self) -> None:
        """Asks every rank to publish its stack."""
        self._store.add(_REPORTS, 1)

    def reports(self) -> int:
        """How often a report was requested."""
        return int(self._store.add(_REPORTS, 0))


def stack_of(thread: int) -> str:
    """A thread's Python stack, innermost call last."""
    frame = sys._current_frames().get(thread)
    calls = traceback.extract_stack(frame)[-_STACK_DEPTH:] if frame else []
    return "\n".join(f"{'/'.join(Path(call.filename).parts[-3:])}:{call.lineno} in {call.name}" for call in calls)


def describe_missing(before: dict[int, Heartbeat], now: dict[int, Heartbeat]) -> str:
    """Which ranks have failed, ended or are behind, by two states some heartbeats apart."""
    furthest = max(heartbeat.position for heartbeat in now.values())
    failed = any(heartbeat.error for heartbeat in now.values())
    lines = []
    for rank, heartbeat in now.items():
        name = f"rank {rank} ({heartbeat.host})"
        if heartbeat.error:
            lines.append(f"{name} failed at {heartbeat.place}: {heartbeat.error}")
        elif failed:
            continue  # the others wait for it, or end because of it
        elif heartbeat.beat == before[rank].beat:
            lines.append(f"{name} has ended; last seen at {heartbeat.place}")
        elif heartbeat.position < furthest:
            lines.append(f"{name} is missing; at {heartbeat.place} for {heartbeat.since:.0f} s")
    return "; ".join(lines) or "lost the connection to the other ranks, though all of them are alive"


def format_report(heartbeats: dict[int, Heartbeat], number: int) -> str:
    """Where every rank is in report `number`; ranks with the same place and stack are grouped."""
    lines, groups = ["where the ranks are:"], dict[tuple[str, str], list[int]]()
    for rank, heartbeat in heartbeats.items():
        if heartbeat.error:
            lines.append(f"  rank {rank} ({heartbeat.host}) failed at {heartbeat.place}: {heartbeat.error}")
        elif heartbeat.answered < number:
            lines.append(f"  rank {rank} ({heartbeat.host}) does not respond; last seen at {heartbeat.place}")
        else:
            groups.setdefault((heartbeat.place, heartbeat.stack), []).append(rank)
    for (place, stack), ranks in groups.items():
        if len(ranks) == 1:
            names = f"rank {ranks[0]} ({heartbeats[ranks[0]].host})"
        else:
            names = f"ranks {_ranges(ranks)}"
        lines.append(f"  {names} at {place}, for {max(heartbeats[rank].since for rank in ranks):.0f} s:")
        lines += [f"    {call}" for call in stack.splitlines()]
    return "\n".join(lines)


def _ranges(numbers: list[int]) -> str:
    """Rising numbers as "0, 2-7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
