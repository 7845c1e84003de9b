"""The results of all nodes of a preflight: which nodes failed, why, and how to leave them out."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lavic.errors import LavicError

MISSING = "missing"
"""State of a file or package that a node does not have."""

Results = Mapping[str, Mapping[str, Any]]
"""Results of one check by node; or by check, for each node."""


class PreflightReport:
    """Reads the results of the nodes' checks and reports which nodes failed."""

    def __init__(self, nodes: Sequence[str]) -> None:
        self.nodes = nodes
        self._problems: dict[str, list[str]] = defaultdict(list)
        """Problems by node."""
        self._results: dict[str, list[dict[str, Any]]] = defaultdict(list)
        """Results by node, in the order of their checks."""
        self._between_nodes: list[str] = []
        """Problems between nodes that cannot be attributed to one of them."""

    def read(self, lines: Iterable[str]) -> None:
        """Reads the nodes' results; other lines are passed on to stderr."""
        for line in lines:
            try:
                result = json.loads(line)
                node = result["node"]
            except (ValueError, TypeError, KeyError):
                print(line.rstrip(), file=sys.stderr)
                continue
            self._results[node].append(result)
            self._problems[node] += result.get("problems", ())

    def conclude(self) -> int:
        """Prints the report; returns 0 if every node passed, else 1.

        Raises:
            LavicError: There is a problem that cannot be attributed to a node.
        """
        by_node = {node: {result["check"]: result for result in self._results[node]} for node in self.nodes}
        self._check_all_answered(by_node)
        checked = {node: results["node"] for node, results in by_node.items() if "node" in results}
        for note in dict.fromkeys(f"{node}: {note}" for node, result in checked.items() for note in result["notes"]):
            print(f"preflight: note: {note}")
        self._check_all_same({node: result["facts"] for node, result in checked.items()})
        self._check_links(by_node)
        self._check_all_reduce(by_node)
        failed = [node for node in self.nodes if self._problems[node]]
        for node in failed:
            for problem in dict.fromkeys(self._problems[node]):
                print(f"preflight: {node}: {problem}")
        if failed:
            for problem in self._between_nodes:
                print(f"preflight: {problem}")
            count = f"{len(failed)} of {len(self.nodes)} nodes failed"
            print(
                f"preflight: {count}; exclude {'it' if len(failed) == 1 else 'them'} with --exclude={','.join(failed)}"
            )
            return 1
        if self._between_nodes:
            hint = f"`sbatch --nodes {len(self.nodes) + 1} slurm/gpu.sbatch preflight` compares them with another node"
            raise LavicError(f"{'; '.join(self._between_nodes)}; it is not clear which node is at fault: {hint}")
        print(f"preflight: {self._summary(checked, by_node)}")
        return 0

    def _check_all_answered(self, by_node: Results) -> None:
        for node, results in by_node.items():
            if "node" not in results:
                self._problems[node].append("no answer: it hangs, or could not start a process")
            elif "end" not in results:
                self._problems[node].append("did not finish: it hangs in the all-reduce, or its probe was killed")

    def _check_all_same(self, facts: Results) -> None:
        """Finds nodes that differ from most others: their copy of lavic, their packages, driver or data."""
        states: dict[str, dict[str, str]] = defaultdict(dict)
        for node, node_facts in facts.items():
            states["the code of lavic"][node] = node_facts["code"]
            for name, version in node_facts["packages"].items():
                states[name][node] = version
            for path, state in node_facts["data"].items():
                states[path][node] = state
            if "driver" in node_facts:
                states["driver"][node] = ", ".join(node_facts["driver"])
        for name, by_node in states.items():
            present = {node: by_node[node] for node in facts if by_node.get(node, MISSING) != MISSING}
            ranked = Counter(present.values()).most_common()
            if not ranked or ranked[0][1] == len(facts):
                continue
            most_common, most_common_count = ranked[0]
            for node in facts:
                if node not in present:
                    self._problems[node].append(f"{name} is missing")
            if len(ranked) > 1 and ranked[1][1] == most_common_count:
                state_by_node = ", ".join(f"{state} on {node}" for node, state in present.items())
                self._between_nodes.append(f"{name} is not the same on all nodes: {state_by_node}")
                continue
            for node, state in present.items():
                if state != most_common:
                    self._problems[node].append(f"{name} differs from the other nodes ({state}, there {most_common})")

    def _check_links(self, by_node: Results) -> None:
        """Finds the node at fault where there is no connection between the first node and another."""
        first, *others = self.nodes
        failed = {node: by_node[node]["link"]["why"] for node in others if "link" in by_node[node]}
        if not failed or self._problems[first]:
            return
        example = f"{others[0]}: {failed.get(others[0], '')}"
        if len(others) == 1:
            self._between_nodes.append(f"{first} and {others[0]} cannot connect to each other ({example})")
        elif len(failed) == len(others):
            self._problems[first].append(f"no other node can connect to it, or it to them ({example})")
        else:
            for node, why in failed.items():
                self._problems[node].append(why)

    def _check_all_reduce(self, by_node: Results) -> None:
        """Finds the nodes that break the all-reduce, by the all-reduces of pairs."""
        results = {node: checks["all_reduce"] for node, checks in by_node.items() if "all_reduce" in checks}
        failed = {node: result for node, result in results.items() if not result["ok"]}
        if not failed or any(self._problems.values()):
            return
        pairs = {node: [result["ok"] for result in self._results[node] if result["check"] == "pair"] for node in failed}
        at_fault = [node for node, oks in pairs.items() if oks and not any(oks)]
        for node in at_fault:
            self._problems[node].append(f"no all-reduce with its neighbours: {failed[node]['why']}")
        if not at_fault:
            reasons = "; ".join(f"{node}: {result['why']}" for node, result in failed.items())
            self._between_nodes.append(f"the all-reduce over {', '.join(self.nodes)} failed ({reasons})")

    def _summary(self, checked: Results, by_node: Results) -> str:
        count = len(self.nodes)
        parts = [f"{count} node{'s' if count > 1 else ''} passed"]
        first = checked[self.nodes[0]]["facts"]
        if first.get("gpus"):
            free = min(result["facts"].get("gpu_free_mib", 0) for result in checked.values()) / 1024
            parts.append(f"{', '.join(first['gpus'])}, {free:.0f} GiB free, driver {', '.join(first['driver'])}")
        if reduced := [results["all_reduce"] for results in by_node.values() if "all_reduce" in results]:
            rate = min(result["bytes_per_s"] for result in reduced) / 1e9
            seconds = max(result["seconds"] for result in reduced)
            parts.append(f"all-reduce in {seconds:.0f} s with start-up, {rate:.2f} GB/s")
        return "; ".join(parts)
