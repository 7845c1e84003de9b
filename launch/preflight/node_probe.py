"""What one node of a job finds out about itself, and about its way to the others.

Each finding is one JSON object on a line of stdout; `launch.preflight` reads those of all nodes and judges. A node that
hangs is one whose lines stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavic.launch.preflight.inventory import code_digest, digest, gpus, memory, packages

_GIB = 2**30
_KNOCK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One node's part of the look."""

    nodes: Sequence[str]
    """Every node of the job."""
    addresses: Sequence[str]
    """Where each can be reached."""
    here: str
    """This node."""
    kind: str
    """What is going to run: ranks, ray or cpu."""
    ranks: int
    """Ranks on each node."""
    gpus: int
    """GPUs asked for on each node."""
    port: int
    """First of a few ports on every node."""
    data: Sequence[Path]
    """Files and folders that are read, the same on every node."""
    seen: Path | None
    """A file that the first node wrote: is the folder shared?"""
    disk_gib: float
    """Free space wanted."""
    memory_gib: float
    """Free memory wanted."""
    within_s: float
    """Time for everything."""

    def run(self) -> None:
        """Looks, and says what was found."""
        began = time.monotonic()
        bad: list[str] = []
        notes: list[str] = []
        facts: dict[str, Any] = {"code": code_digest(), "packages": packages(), "data": self._data()}
        bad += self._disk(notes)
        bad += memory(self.memory_gib)
        if self.gpus and os.environ.get("LAVIC_DEVICE") != "cpu":
            cards = list(gpus(self.gpus, facts, within_s=self.within_s / 2))
            bad += cards
        self._say("look", bad=bad, notes=notes, facts=facts)
        left = self.within_s - (time.monotonic() - began)
        if self.kind == "ranks" and len(self.nodes) * self.ranks > 1:
            self._reduce(left)
        elif self.kind == "ray":
            self._ports(left / 2)
        self._say("end")

    def _say(self, what: str, **more: Any) -> None:
        line = json.dumps({"node": self.here, "what": what, **more}) + "\n"
        os.write(sys.stdout.fileno(), line.encode())  # in one piece: the nodes share the stream

    def _data(self) -> dict[str, str]:
        return {str(path): digest(path) for path in self.data}

    def _disk(self, notes: list[str]) -> Iterator[str]:
        for place in dict.fromkeys((Path.cwd(), Path(tempfile.gettempdir()))):
            free = shutil.disk_usage(place).free / _GIB
            if free < self.disk_gib:
                yield f"{free:.1f} GiB free in {place}, {self.disk_gib:g} wanted"
        try:
            with tempfile.TemporaryFile() as file:
                file.write(b"x")
        except OSError as error:
            yield f"cannot write to {tempfile.gettempdir()} ({error})"
        if self.seen and not self.seen.exists():
            yield f"does not see {self.seen.parent}, which the first node wrote to: not a shared folder?"
        shared = Path("/dev/shm")
        if self.kind == "ranks" and shared.exists() and shutil.disk_usage(shared).total < _GIB / 4:
            notes.append(
                f"/dev/shm has {shutil.disk_usage(shared).total >> 20} MiB: little for NCCL and loader processes"
            )

    def _reduce(self, left_s: float) -> None:
        """All ranks together; where that fails, neighbours in pairs, so that the one in the way can be told."""
        me, count = self.nodes.index(self.here), len(self.nodes)
        done = self._all_reduce(me, list(range(count)), self.port, left_s * 0.5)
        self._say("reduce", **done)
        if done["right"] or count < 3:
            return
        for turn in (0, 1):
            first = (me - turn) // 2 * 2 + turn
            pair = [first % count, (first + 1) % count]
            if pair[0] == pair[1] or first + 1 >= count + turn:
                continue
            done = self._all_reduce(pair.index(me), pair, self.port + 1 + first, left_s * 0.2)
            self._say("pair", **{**done, "with": next(self.nodes[n] for n in pair if n != me)})

    def _all_reduce(self, place: int, among: Sequence[int], port: int, within_s: float) -> dict[str, Any]:
        """Starts this node's ranks of one all-reduce and gives up on them after a while."""
        began = time.monotonic()
        words = [sys.executable, "-m", "lavic.launch.preflight.allreduce", str(within_s)]
        env = {
            **os.environ,
            "WORLD_SIZE": str(len(among) * self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "GROUP_RANK": str(place),
            "MASTER_ADDR": self.addresses[among[0]],
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        ranks = []
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            for local in range(self.ranks):
                said = stack.enter_context(Path(folder, str(local)).open("w+"))
                more = {"RANK": str(place * self.ranks + local), "LOCAL_RANK": str(local)}
                ranks.append((said, subprocess.Popen(words, env={**env, **more}, stdout=said, stderr=said)))
            right, rate, why = True, 0.0, ""
            for number, (said, rank) in enumerate(ranks):
                try:
                    rank.wait(max(0.1, within_s - (time.monotonic() - began)))
                except subprocess.TimeoutExpired:
                    rank.send_signal(signal.SIGKILL)
                    rank.wait()
                    why = why or f"rank {number} of this node got no answer within {within_s:.0f} s"
                said.seek(0)
                lines = said.read().strip().splitlines()
                if rank.returncode:
                    right = False
                    why = why or (f"rank {number} of this node: {lines[-1][:300]}" if lines else "it said nothing")
                else:
                    answer = json.loads(lines[-1])
                    rate = answer["bytes_per_s"]
        return {"right": right, "bytes_per_s": rate, "seconds": round(time.monotonic() - began, 1), "why": why}

    def _ports(self, within_s: float) -> None:
        """The first node holds Ray's port for a while and the others knock; it knocks back, as Ray's processes do."""
        until = time.monotonic() + within_s
        if self.here == self.nodes[0]:
            self._answer(until)
        elif why := self._knock(until):
            self._say("link", why=why)

    def _answer(self, until: float) -> None:
        """The first node's part."""
        try:
            server = socket.create_server(("", self.port))
        except OSError as error:
            self._say("port", bad=[f"port {self.port} is taken ({error.strerror}): set RAY_PORT or RDZV_PORT"])
            return
        left = len(self.nodes) - 1
        with server:
            server.settimeout(0.2)
            while left and time.monotonic() < until:
                with contextlib.suppress(OSError, ValueError, IndexError), server.accept()[0] as caller:
                    caller.settimeout(_KNOCK_S)
                    place, port = map(int, caller.recv(64).split())
                    try:
                        socket.create_connection((self.addresses[place], port), timeout=_KNOCK_S).close()
                    except OSError as error:
                        caller.sendall(str(error).encode())
                    else:
                        caller.sendall(b"well")
                        left -= 1

    def _knock(self, until: float) -> str:
        """Another node's part; why it did not come about, for which this node or the first may be the cause."""
        address, why = (self.addresses[0], self.port), ""
        with socket.create_server(("", 0)) as own:  # such a port as Ray's processes take on every node
            port = own.getsockname()[1]
            while time.monotonic() < until:
                try:
                    with socket.create_connection(address, timeout=_KNOCK_S) as knock:
                        knock.sendall(f"{self.nodes.index(self.here)} {port}".encode())
                        said = knock.recv(200).decode()
                except TimeoutError:
                    continue
                except OSError as error:
                    why = f"cannot reach {address[0]}:{address[1]} on the first node ({error})"
                else:
                    if said == "well":
                        return ""
                    why = f"the first node cannot reach its port {port} ({said}); Ray needs those above 1023"
                time.sleep(0.2)
        return why
