"""`lavic preflight`: checks the nodes of a job before it starts, before a model is loaded."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from lavic.config import parse, settings
from lavic.errors import ConfigError
from lavic.launch.preflight.node_probe import NodeProbe
from lavic.launch.preflight.report import PreflightReport

DESCRIPTION = """Checks a node, or all nodes of a job: number of GPUs, driver, free GPU and main memory, memory errors;
disk; the same code, packages and data on all nodes; a small all-reduce over all ranks; Ray's ports.

  lavic preflight --ranks 8 --gpus 8

checks this machine. The batch scripts (slurm/) check every node of a job before each start: `--probe` runs on each
node, and `--read` collects the results and names the nodes that failed or do not answer, with the `--exclude` option
that leaves them out. Exit code 0 if all nodes pass, 1 if one fails."""


@settings
class PreflightSettings:
    """What is checked, and for how long."""

    kind: Literal["ranks", "ray", "cpu"] = "ranks"
    """What the job runs: ranks that communicate, Ray, or neither."""
    ranks: PositiveInt = 1
    """Ranks per node."""
    gpus: NonNegativeInt = 0
    """GPUs that each node must have."""
    disk: PositiveFloat = 1.0
    """GiB that must be free in the working folder and in the temporary folder."""
    memory: PositiveFloat = 1.0
    """GiB of main memory that must be free."""
    data: tuple[Path, ...] = ()
    """Files and folders that must be the same on every node."""
    nodes: tuple[str, ...] = ()
    """The job's nodes; by default this machine."""
    addresses: tuple[str, ...] = ()
    """Network address of each node; by default its name."""
    port: PositiveInt = 29500
    """Rendezvous port; a few ports above it are used too."""
    seen: Path | None = None
    """A file in a shared folder that every node must see."""
    within: PositiveFloat = 120.0
    """Time limit for all checks, seconds."""
    probe: bool = False
    """Check this node only and print the results, a JSON object per line."""
    read: bool = False
    """Read such results of all nodes from stdin and report."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    chosen = parse(PreflightSettings, argv, command="preflight", description=DESCRIPTION)
    this_node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    nodes = chosen.nodes or (this_node,)
    if chosen.addresses and len(chosen.addresses) != len(nodes):
        raise ConfigError(f"--addresses: {len(chosen.addresses)} for {len(nodes)} --nodes; give one per node")
    if chosen.read:
        report = PreflightReport(nodes)
        report.read(_lines(chosen.within, sys.stdin))
        return report.conclude()
    if this_node not in nodes:
        raise ConfigError(f"this is {this_node}, which is not among --nodes {' '.join(nodes)}")
    if not chosen.probe:
        return _check_this_machine(["preflight", *(argv or ()), "--probe"], nodes, chosen)
    addresses = chosen.addresses or (nodes if len(nodes) > 1 else ("127.0.0.1",))
    NodeProbe(chosen, nodes=nodes, addresses=addresses, this_node=this_node).run()
    return 0


def _check_this_machine(args: Sequence[str], nodes: Sequence[str], chosen: PreflightSettings) -> int:
    """Runs the probe in a process of its own, which is killed when the time is up."""
    if len(nodes) > 1:
        raise ConfigError("--nodes names several nodes: `sbatch slurm/gpu.sbatch preflight` checks the nodes of a job")
    report = PreflightReport(nodes)
    with subprocess.Popen([sys.executable, "-m", "lavic", *args], stdout=subprocess.PIPE, text=True) as probe:
        assert probe.stdout
        report.read(_lines(chosen.within, probe.stdout))
        probe.kill()
    return report.conclude()


def _lines(timeout_s: float, stream: Iterable[str]) -> Iterator[str]:
    """Lines as they come, until the stream ends or the time is up."""
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    deadline = time.monotonic() + timeout_s
    while (remaining_s := deadline - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=remaining_s)
        except queue.Empty:
            return
        if line is None:
            return
        yield line
