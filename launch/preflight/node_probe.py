"""The checks that one node of a job makes of itself and of its connections to the other nodes.

Each result is one JSON object on a line of stdout; `PreflightReport` reads those of all nodes. A node that hangs is one
whose lines stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavic.distributed.context import DistributedContext
from lavic.distributed.rank_process import rank_environment
from lavic.launch.preflight.inventory import code_digest, data_digest, gpu_problems, memory_problems, package_versions

if TYPE_CHECKING:
    from lavic.launch.preflight.command import PreflightSettings

_GIB = 2**30
_CONNECT_S = 2.0
_SHARE_OF_TIME = 0.9
"""Share of `--within` for the checks; the rest is for starting and ending."""


@dataclass(frozen=True)
class NodeProbe:
    """The checks of one node."""

    settings: PreflightSettings
    nodes: Sequence[str]
    """Every node of the job."""
    addresses: Sequence[str]
    """Network address of each."""
    this_node: str

    def run(self) -> None:
        """Runs all checks and prints their results."""
        settings, start = self.settings, time.monotonic()
        timeout_s = _SHARE_OF_TIME * settings.within
        notes: list[str] = []
        facts: dict[str, Any] = {
            "code": code_digest(),
            "packages": package_versions(),
            "data": {str(path): data_digest(path) for path in settings.data},
        }
        problems = [*self._disk_problems(notes), *memory_problems(settings.memory)]
        if settings.gpus and os.environ.get("LAVIC_DEVICE") != "cpu":
            problems += gpu_problems(settings.gpus, facts, timeout_s=timeout_s / 2)
        self._print("node", problems=problems, notes=notes, facts=facts)
        remaining_s = timeout_s - (time.monotonic() - start)
        if settings.kind == "ranks" and len(self.nodes) * settings.ranks > 1:
            self._check_all_reduce(remaining_s)
        elif settings.kind == "ray":
            self._check_ports(remaining_s / 2)
        self._print("end")

    def _print(self, check: str, **result: Any) -> None:
        line = json.dumps({"node": self.this_node, "check": check, **result}) + "\n"
        os.write(sys.stdout.fileno(), line.encode())  # in one write: the nodes share the stream

    def _disk_problems(self, notes: list[str]) -> Iterator[str]:
        for folder in dict.fromkeys((Path.cwd(), Path(tempfile.gettempdir()))):
            free = shutil.disk_usage(folder).free / _GIB
            if free < self.settings.disk:
                yield f"{free:.1f} GiB free in {folder}, {self.settings.disk:g} required"
        try:
            with tempfile.TemporaryFile() as file:
                file.write(b"x")
        except OSError as error:
            yield f"cannot write to {tempfile.gettempdir()} ({error})"
        if (shared := self.settings.seen) and not shared.exists():
            yield f"does not see what the first node wrote to {shared.parent}: is it a shared folder?"
        shared_memory = Path("/dev/shm")
        if self.settings.kind == "ranks" and shared_memory.exists():
            total = shutil.disk_usage(shared_memory).total
            if total < _GIB / 4:
                notes.append(f"/dev/shm has {total >> 20} MiB, which is little for NCCL and data loader processes")

    def _check_all_reduce(self, left_s: float) -> None:
        """An all-reduce over all ranks; if it fails, one per pair of neighbours, to find the node at fault."""
        node_index, count = self.nodes.index(self.this_node), len(self.nodes)
        result = self._all_reduce(node_index, list(range(count)), self.settings.port, left_s * 0.5)
        self._print("all_reduce", **result)
        if result["ok"] or count < 3:
            return
        for turn in (0, 1):
            first = (node_index - turn) // 2 * 2 + turn
            pair = [first % count, (first + 1) % count]
            if pair[0] == pair[1] or first + 1 >= count + turn:
                continue
            result = self._all_reduce(pair.index(node_index), pair, self.settings.port + 1 + first, left_s * 0.2)
            self._print("pair", **result, other=next(self.nodes[number] for number in pair if number != node_index))

    def _all_reduce(self, node_index: int, group: Sequence[int], port: int, timeout_s: float) -> dict[str, Any]:
        """Starts this node's ranks of an all-reduce between some nodes; kills them when the time is up."""
        start = time.monotonic()
        command = [sys.executable, "-m", "lavic.launch.preflight.allreduce", str(timeout_s)]
        ranks, processes = self.settings.ranks, []
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            for local_rank in range(ranks):
                output = stack.enter_context(Path(folder, str(local_rank)).open("w+"))
                rank = DistributedContext(
                    rank=node_index * ranks + local_rank,
                    local_rank=local_rank,
                    size=len(group) * ranks,
                    local_world_size=ranks,
                    node_rank=node_index,
                )
                env = {**os.environ, **rank_environment(rank, self.addresses[group[0]], port), "OMP_NUM_THREADS": "1"}
                processes.append((output, subprocess.Popen(command, env=env, stdout=output, stderr=output)))
            ok, rate, why = True, 0.0, ""
            for local_rank, (output, process) in enumerate(processes):
                try:
                    process.wait(max(0.1, timeout_s - (time.monotonic() - start)))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    why = why or f"local rank {local_rank} got no answer within {timeout_s:.0f} s"
                output.seek(0)
                lines = output.read().strip().splitlines()
                if process.returncode:
                    ok = False
                    why = why or f"local rank {local_rank}: {lines[-1][:300] if lines else 'it printed nothing'}"
                else:
                    rate = json.loads(lines[-1])["bytes_per_s"]
        return {"ok": ok, "bytes_per_s": rate, "seconds": round(time.monotonic() - start, 1), "why": why}

    def _check_ports(self, timeout_s: float) -> None:
        """The first node listens on Ray's port; the others connect to it and it to them, as Ray's processes do."""
        deadline = time.monotonic() + timeout_s
        if self.this_node == self.nodes[0]:
            self._listen(deadline)
        elif why := self._connect(deadline):
            self._print("link", why=why)

    def _listen(self, deadline: float) -> None:
        """The part of the first node."""
        try:
            server = socket.create_server(("", self.settings.port))
        except OSError as error:
            problem = f"port {self.settings.port} is in use ({error.strerror}): set RAY_PORT or RDZV_PORT"
            self._print("port", problems=[problem])
            return
        num_waiting = len(self.nodes) - 1
        with server:
            server.settimeout(0.2)
            while num_waiting and time.monotonic() < deadline:
                with contextlib.suppress(OSError, ValueError, IndexError), server.accept()[0] as caller:
                    caller.settimeout(_CONNECT_S)
                    node_index, port = map(int, caller.recv(64).split())
                    try:
                        socket.create_connection((self.addresses[node_index], port), timeout=_CONNECT_S).close()
                    except OSError as error:
                        caller.sendall(str(error).encode())
                    else:
                        caller.sendall(b"ok")
                        num_waiting -= 1

    def _connect(self, deadline: float) -> str:
        """The part of another node. Returns why it failed, for which this node or the first may be the cause."""
        address, why = (self.addresses[0], self.settings.port), ""
        with socket.create_server(("", 0)) as server:  # a port such as Ray's processes take on every node
            port = server.getsockname()[1]
            while time.monotonic() < deadline:
                try:
                    with socket.create_connection(address, timeout=_CONNECT_S) as connection:
                        connection.sendall(f"{self.nodes.index(self.this_node)} {port}".encode())
                        answer = connection.recv(200).decode()
                except TimeoutError:
                    continue
                except OSError as error:
                    why = f"cannot connect to {address[0]}:{address[1]} on the first node ({error})"
                else:
                    if answer == "ok":
                        return ""
                    why = f"the first node cannot connect to its port {port} ({answer}); Ray needs those above 1023"
                time.sleep(0.2)
        return why
