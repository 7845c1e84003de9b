"""`lavic preflight`: can the nodes of a job do what it is about to ask of them? Before a model is loaded."""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from lavic.config import parse, settings
from lavic.errors import ConfigError, LavicError
from lavic.launch.preflight.node_probe import Probe

DESCRIPTION = """Looks at a node, or at all nodes of a job: GPUs seen against those asked for, driver, free memory,
memory errors; disk; the same code, packages and data everywhere; a small all-reduce over all ranks; Ray's ports.

  lavic preflight --ranks 8 --gpus 8

looks at this machine. The batch scripts (slurm/) look at every node of a job before each start: there `--probe` runs on
each node, and `--read` reads what they all say and names the bad ones, also those that hang and say nothing, with the
`--exclude` to use. Exit code 0 when all are well, 1 when one is not."""


@settings
class PreflightSettings:
    """What is looked at, and for how long."""

    kind: Literal["ranks", "ray", "cpu"] = "ranks"
    """What is going to run: ranks that talk to each other, Ray, or neither."""
    ranks: PositiveInt = 1
    """Ranks on each node."""
    gpus: NonNegativeInt = 0
    """GPUs that each node must have."""
    disk: PositiveFloat = 1.0
    """GiB that must be free in the working folder and in the folder of temporary files."""
    memory: PositiveFloat = 1.0
    """GiB of memory that must be free."""
    data: tuple[Path, ...] = ()
    """Files and folders that must be the same on every node."""
    nodes: tuple[str, ...] = ()
    """The job's nodes; none: this machine."""
    addresses: tuple[str, ...] = ()
    """Where each of them can be reached; by default under its name."""
    port: PositiveInt = 29500
    """Port to meet at, and a few above it."""
    seen: Path | None = None
    """A file in a shared folder that every node must see."""
    within: PositiveFloat = 120.0
    """Seconds for everything."""
    probe: bool = False
    """Print what this node finds, a JSON object a line."""
    read: bool = False
    """Judge by such lines from stdin."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    chosen = parse(PreflightSettings, argv, command="preflight", description=DESCRIPTION)
    here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    nodes = chosen.nodes or (here,)
    if chosen.addresses and len(chosen.addresses) != len(nodes):
        raise ConfigError(f"--addresses: {len(chosen.addresses)} for {len(nodes)} --nodes")
    if chosen.read:
        judge = Judge(nodes)
        judge.listen(_lines(chosen.within))
        return judge.conclude()
    if here not in nodes:
        raise ConfigError(f"this is {here}, which is not among --nodes {' '.join(nodes)}")
    words = ["preflight", *(argv or ()), "--probe"]
    if not chosen.probe:
        return _alone(words, nodes, chosen)
    Probe(
        nodes=nodes,
        addresses=chosen.addresses or (nodes if len(nodes) > 1 else ("127.0.0.1",)),
        here=here,
        kind=chosen.kind,
        ranks=chosen.ranks,
        gpus=chosen.gpus,
        port=chosen.port,
        data=chosen.data,
        seen=chosen.seen,
        disk_gib=chosen.disk,
        memory_gib=chosen.memory,
        within_s=chosen.within * 0.9,
    ).run()
    return 0


def _alone(words: Sequence[str], nodes: Sequence[str], chosen: PreflightSettings) -> int:
    """This machine only: the same probe, in a process that can be given up on."""
    import subprocess

    if len(nodes) > 1:
        raise ConfigError("--nodes names several: `sbatch slurm/preflight.sbatch` looks at the nodes of a job")
    judge = Judge(nodes)
    with subprocess.Popen([sys.executable, "-m", "lavic", *words], stdout=subprocess.PIPE, text=True) as probe:
        assert probe.stdout
        judge.listen(_lines(chosen.within, probe.stdout))
        probe.kill()
    return judge.conclude()


def _lines(within_s: float, stream: Iterable[str] = sys.stdin) -> Iterator[str]:
    """Lines as they come, until the stream ends or the time is up."""
    coming: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        for line in stream:
            coming.put(line)
        coming.put(None)

    threading.Thread(target=pump, daemon=True).start()
    until = time.monotonic() + within_s
    while (left := until - time.monotonic()) > 0:
        try:
            line = coming.get(timeout=left)
        except queue.Empty:
            return
        if line is None:
            return
        yield line


@dataclass
class Judge:
    """Reads what the nodes found and says which of them would not do."""

    nodes: Sequence[str]
    bad: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Node -> what is wrong with it."""
    said: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    unclear: list[str] = field(default_factory=list)
    """What is wrong between nodes, where none of them can be named as the cause."""

    def listen(self, lines: Iterable[str]) -> None:
        """Takes in the nodes' lines; passes on any other."""
        for line in lines:
            try:
                finding = json.loads(line)
                node = finding["node"]
            except (ValueError, TypeError, KeyError):
                print(line.rstrip(), file=sys.stderr)
                continue
            self.said[node].append(finding)
            self.bad[node] += finding.get("bad", ())

    def conclude(self) -> int:
        """Prints the verdict; returns 0 when every node is well, else 1.

        Raises:
            LavicError: What is wrong cannot be laid to a node.
        """
        heard = {node: {finding["what"]: finding for finding in self.said[node]} for node in self.nodes}
        self._silent(heard)
        looks = {node: found["look"] for node, found in heard.items() if "look" in found}
        for note in dict.fromkeys(f"{node}: {note}" for node, look in looks.items() for note in look["notes"]):
            print(f"preflight: note: {note}")
        self._odd_ones_out({node: look["facts"] for node, look in looks.items()})
        self._linked(heard)
        self._reduced(heard)
        bad = [node for node in self.nodes if self.bad[node]]
        for node in bad:
            for reason in dict.fromkeys(self.bad[node]):
                print(f"preflight: {node}: {reason}")
        if bad:
            for sentence in self.unclear:
                print(f"preflight: {sentence}")
            count = f"{len(bad)} of {len(self.nodes)} nodes will not do"
            print(f"preflight: {count}; leave out with: --exclude={','.join(bad)}")
            return 1
        if self.unclear:
            more = f"`sbatch --nodes {len(self.nodes) + 1} slurm/preflight.sbatch` compares them with another"
            raise LavicError(f"{'; '.join(self.unclear)}; which node is at fault cannot be told: {more}")
        print(f"preflight: {self._praise(looks, heard)}")
        return 0

    def _silent(self, heard: Mapping[str, Mapping[str, Any]]) -> None:
        for node, found in heard.items():
            if "look" not in found:
                self.bad[node].append("said nothing: it hangs, or could not start a process")
            elif "end" not in found:
                self.bad[node].append("began and did not come to an end: it hangs in the all-reduce, or was ended")

    def _odd_ones_out(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Nodes that differ from most: another copy of the code, other packages, other or missing data."""
        values: dict[str, dict[str, str]] = defaultdict(dict)
        for node, found in facts.items():
            values["the code of lavic"][node] = found["code"]
            for name, version in found["packages"].items():
                values[name][node] = version
            for path, state in found["data"].items():
                values[path][node] = state
            if "driver" in found:
                values["driver"][node] = ", ".join(found["driver"])
        for name, of in values.items():
            present = Counter(of[node] for node in facts if of.get(node, "gone") != "gone")
            ranked = present.most_common()
            if not ranked or ranked[0][1] == len(facts):
                continue
            usual, most = ranked[0]
            for node in facts:
                if of.get(node, "gone") == "gone":
                    self.bad[node].append(f"{name} is missing")
            if len(ranked) > 1 and ranked[1][1] == most:
                states = ", ".join(f"{of[node]} on {node}" for node in facts if of.get(node, "gone") != "gone")
                self.unclear.append(f"{name} is not the same on all nodes: {states}")
                continue
            for node in facts:
                if of.get(node, "gone") not in ("gone", usual):
                    self.bad[node].append(f"{name} is not that of the others ({of[node]}, {usual})")

    def _linked(self, heard: Mapping[str, Mapping[str, Any]]) -> None:
        """Which end of a connection between the first node and another is the cause where there is none."""
        first, *others = self.nodes
        failed = {node: heard[node]["link"]["why"] for node in others if "link" in heard[node]}
        if not failed or self.bad[first]:
            return
        if len(others) == 1:
            self.unclear.append(f"{first} and {others[0]} do not reach each other ({others[0]}: {failed[others[0]]})")
        elif len(failed) == len(others):
            self.bad[first].append(f"no other node reaches it, or is reached by it ({others[0]}: {failed[others[0]]})")
        else:
            for node, why in failed.items():
                self.bad[node].append(why)

    def _reduced(self, heard: Mapping[str, Mapping[str, Any]]) -> None:
        """Who was in the way of the all-reduce."""
        failed = {node: found["reduce"] for node, found in heard.items() if "reduce" in found}
        failed = {node: done for node, done in failed.items() if not done["right"]}
        if not failed or any(self.bad.values()):
            return
        pairs = {n: [f["right"] for f in self.said[n] if f["what"] == "pair"] for n in failed}
        culprits = [node for node, right in pairs.items() if right and not any(right)]
        for node in culprits:
            self.bad[node].append(f"no all-reduce with its neighbours: {failed[node]['why']}")
        if culprits:
            return
        whys = "; ".join(f"{node}: {done['why']}" for node, done in failed.items())
        self.unclear.append(f"the all-reduce over {', '.join(self.nodes)} failed ({whys})")

    def _praise(self, looks: Mapping[str, Any], heard: Mapping[str, Mapping[str, Any]]) -> str:
        words = [f"{len(self.nodes)} node{'s' if len(self.nodes) > 1 else ''} well"]
        first = looks[self.nodes[0]]["facts"]
        if first.get("gpus"):
            free = min(look["facts"].get("gpu_free_mib", 0) for look in looks.values()) / 1024
            words.append(f"{', '.join(first['gpus'])}, {free:.0f} GiB free, driver {', '.join(first['driver'])}")
        if done := [found["reduce"] for found in heard.values() if "reduce" in found]:
            slowest = min(one["bytes_per_s"] for one in done) / 1e9
            words.append(f"all-reduce in {max(one['seconds'] for one in done):.0f} s with start-up, {slowest:.2f} GB/s")
        return "; ".join(words)
