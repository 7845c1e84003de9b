"""Runs of the toy task in real processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lavic.distributed.context import DistributedContext
from lavic.distributed.launcher_env import restore_launcher_env
from lavic.tracking.journal import read_journal
from tests.fork_server import ForkedProcess, ForkServer
from tests.train.assets import Assets, make_assets

TOY = Path(__file__).with_name("toy.py")
EXACT = ("loss", "grad_norm", "lr", "valid_loss", "valid_hit_rate")
"""What a resumed run must repeat to every digit."""


@pytest.fixture(scope="session")
def process_group() -> Iterator[dict[str, str]]:
    """A process group of one rank, for all tests: DeepSpeed keeps hold of the first group it sees.

    Returns the variables that DeepSpeed reads; processes that other tests start must not inherit them.
    """
    before = dict(os.environ)
    DistributedContext().init_process_group()
    names = {name: value for name, value in os.environ.items() if before.get(name) != value}
    restore_launcher_env()
    yield names
    DistributedContext().destroy_process_group()


@pytest.fixture(scope="module")
def world(process_group: dict[str, str]) -> Iterator[DistributedContext]:
    """The only rank of its process group."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in process_group.items():
            patch.setenv(name, value)
        yield DistributedContext()


@dataclass
class Ranks:
    """The processes of one run."""

    processes: list[ForkedProcess]
    stderr: list[str] = field(default_factory=list)
    """What each has printed, by rank."""

    def wait(self) -> list[int | None]:
        """Exit codes, by rank."""
        self.stderr = [process.communicate()[1] for process in self.processes]
        return [process.returncode for process in self.processes]


Start = Callable[..., Ranks]


@pytest.fixture
def start(fork_server: ForkServer) -> Iterator[Start]:
    """Starts `ranks` processes of the toy in a folder; ends them with the test."""
    started: list[Ranks] = []

    def begin(folder: Path, ranks: int = 1, loop: dict | None = None, **options: object) -> Ranks:
        argv = [TOY, folder, "--loop", json.dumps(loop or {}), "--options", json.dumps(options)]
        run = Ranks(fork_server.popen_ranks(argv, ranks=ranks))
        started.append(run)
        return run

    yield begin
    for run in started:
        fork_server.kill(run.processes)


def curve(folder: Path) -> list[dict[str, float]]:
    """The journal of a run, without values that depend on time."""
    return [{k: row[k] for k in ("step", *EXACT) if k in row} for row in read_journal(folder / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, list]:
    """The weights at the end of a run."""
    return json.loads((folder / "end.json").read_text())["weights"]


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    return make_assets(tmp_path_factory.mktemp("assets"))
