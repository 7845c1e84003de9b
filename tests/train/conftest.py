"""Runs of the toy task in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lavic.distributed.context import DistributedContext
from lavic.distributed.launcher_env import free_port, restore_launcher_env
from lavic.tracking.journal import read_journal
from tests.train.assets import Assets, make_assets

TOY = Path(__file__).with_name("toy.py")
EXACT = ("loss", "grad_norm", "lr", "valid_loss", "valid_hit_rate")
"""What a resumed run must repeat to every digit."""


@pytest.fixture(scope="session")
def process_group() -> Iterator[dict[str, str]]:
    """A process group of one rank, for all tests: DeepSpeed keeps hold of the first group it sees.

    Returns the variables that DeepSpeed reads, which the processes that other tests start must not inherit.
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

    processes: list[subprocess.Popen[str]]
    stderr: list[str] = field(default_factory=list)

    def wait(self, timeout: float = 90) -> list[int]:
        """Exit codes, by rank."""
        try:
            self.stderr = [process.communicate(timeout=timeout)[1] for process in self.processes]
        finally:
            self.kill()
        return [process.returncode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()


Start = Callable[..., Ranks]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `ranks` processes of the toy in a folder; ends them with the test."""
    started: list[Ranks] = []

    def begin(folder: Path, ranks: int = 1, loop: dict | None = None, **options: object) -> Ranks:
        argv = [
            sys.executable,
            str(TOY),
            str(folder),
            "--loop",
            json.dumps(loop or {}),
            "--options",
            json.dumps(options),
        ]
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        env |= {"OMP_NUM_THREADS": "1", "LAVIC_DEVICE": "cpu", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        run = Ranks(
            [
                subprocess.Popen(
                    argv, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
                )
                for rank in range(ranks)
            ]
        )
        started.append(run)
        return run

    yield begin
    for run in started:
        run.kill()


def curve(folder: Path) -> list[dict[str, float]]:
    """The journal of a run, without values that depend on time."""
    return [{k: row[k] for k in ("step", *EXACT) if k in row} for row in read_journal(folder / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, list]:
    """The weights at the end of a run."""
    return json.loads((folder / "end.json").read_text())["weights"]


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    return make_assets(tmp_path_factory.mktemp("assets"))
