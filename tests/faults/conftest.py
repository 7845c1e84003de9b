"""One set of inputs for all commands and faults, and a table of the results."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import go_without
from tests.faults.faulty_run import FaultInputs, missing
from tests.fork_server import ForkServer

_tried: Counter[tuple[str, str]] = Counter()
_passed: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Iterator[FaultInputs]:
    """Inputs of all commands, and what each command makes of them without a fault."""
    if why := missing():
        go_without(why)
    inputs = FaultInputs(tmp_path_factory.mktemp("faults"), fork_server)
    yield inputs
    inputs.close()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts rows by command and fault."""
    row = dict(report.user_properties)
    if report.when == "call" and "fault" in row:
        key = str(row["command"]), str(row["fault"])
        _tried[key] += 1
        _passed[key] += report.passed


def pytest_sessionfinish() -> None:
    """Writes the table to the file that LAVIC_FAULTS_TABLE names."""
    if not (file := os.environ.get("LAVIC_FAULTS_TABLE")):
        return
    commands, faults = (list(dict.fromkeys(names)) for names in zip(*_tried, strict=True))
    lines = ["| | " + " | ".join(faults) + " |", "|---" * (len(faults) + 1) + "|"]
    for command in sorted(commands):
        cells = [f"{_passed[command, fault]}/{count}" if (count := _tried[command, fault]) else "-" for fault in faults]
        lines.append(f"| `{command}` | " + " | ".join(cells) + " |")
    Path(file).write_text("\n".join(lines) + "\n")
