"""What a command and everything it started used: CPU seconds and memory of the whole tree of processes."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_EVERY = 0.25
"""Seconds between two looks at the clocks; what a process uses after the last look at it is not seen."""
_MEMORY_EVERY = 4
"""Looks at the clocks for one at the memory, which costs more."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Used:
    """What a command used."""

    wall: float
    """Seconds from start to end."""
    cpu: float
    """Seconds of CPU, user and system, of the command and all processes below it."""
    peak: int
    """Most bytes of memory at once, pages that several processes share counted once (PSS)."""
    driver: Sequence[tuple[float, int]]
    """Resident bytes of the command's first process, with the second after the start."""
    clock: Sequence[tuple[float, float]]
    """CPU seconds so far, with the second since the epoch."""

    def cpu_between(self, first: float, last: float) -> float:
        """CPU seconds between two seconds since the epoch."""
        return self._cpu_at(last) - self._cpu_at(first)

    def _cpu_at(self, when: float) -> float:
        after = bisect_left(self.clock, (when,))
        if after == 0 or after == len(self.clock):
            return self.clock[0 if after == 0 else -1][1]
        (t0, c0), (t1, c1) = self.clock[after - 1 : after + 1]
        return c0 + (c1 - c0) * (when - t0) / (t1 - t0)


def run(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Used:
    """Run a command to its end, its words into a log.

    Raises:
        SystemExit: It ended with another code than 0.
    """
    with log.open("w") as out:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **(environment or {})})
        tree = _Tree(process.pid)
        tree.start()
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
            wall = time.monotonic() - began
            tree.stop()
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command[:4])} ... ended with {code}:\n{tail}")
    clock = [*tree.clock, (time.time(), tree.clock[-1][1])]
    return Used(wall=wall, cpu=clock[-1][1], peak=tree.peak, driver=tree.driver, clock=clock)


class _Tree(threading.Thread):
    """Looks at a process and what stands below it until it is stopped. A process once seen is followed to its end,
    also when its parent has left it behind."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._alive = {root}
        self._cpu: dict[tuple[int, int], float] = {}
        self._began = time.monotonic()
        self._over = threading.Event()
        self.peak = 0
        self.driver: list[tuple[float, int]] = []
        self.clock: list[tuple[float, float]] = [(time.time(), 0.0)]

    def run(self) -> None:
        looks = 0
        while not self._over.wait(_EVERY):
            self._look()
            if looks % _MEMORY_EVERY == 0:
                self._weigh()
            looks += 1

    def stop(self) -> None:
        self._over.set()
        self.join()
        self._look()

    def _look(self) -> None:
        stats = _processes()
        below: dict[int, list[int]] = {}
        for pid, (parent, _, _) in stats.items():
            below.setdefault(parent, []).append(pid)
        queue = [pid for pid in self._alive if pid in stats]
        self._alive = set()
        while queue:
            pid = queue.pop()
            if pid not in self._alive:
                self._alive.add(pid)
                queue += below.get(pid, [])
                _, started, cpu = stats[pid]
                self._cpu[pid, started] = cpu
        self.clock.append((time.time(), sum(self._cpu.values())))

    def _weigh(self) -> None:
        self.peak = max(self.peak, sum(_field(pid, "smaps_rollup", "Pss:") for pid in self._alive))
        self.driver.append((time.monotonic() - self._began, _field(self._root, "status", "VmRSS:")))


def _processes() -> dict[int, tuple[int, int, float]]:
    """Parent, start and CPU seconds of every process of this machine, those of waited-for children not included."""
    found = {}
    for folder in os.listdir("/proc"):  # noqa: PTH208 - a thousand Path objects a second are not free
        if folder.isdigit():
            try:
                with open(f"/proc/{folder}/stat", "rb") as file:  # noqa: PTH123
                    row = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            found[int(folder)] = (int(row[1]), int(row[19]), (int(row[11]) + int(row[12])) / _TICKS)
    return found


def _field(pid: int, file: str, name: str) -> int:
    try:
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
