"""Two ranks give the same whoever starts them: --nproc, torchrun, or the deepspeed launcher with a hostfile.

`srun` is tried on a real SLURM, in tests/slurm.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lavic.journal import read_journal
from lavic.world import World, free_port
from tests.train.ground import KEY, Ground, make_ground

pytestmark = pytest.mark.dist
ENV = {**os.environ, "LAVIC_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return make_ground(tmp_path_factory.mktemp("ground"))


def words(command: str, ground: Ground, out: Path) -> list[str]:
    inputs = {
        "distill": ["--shards", ground.photos, "--valid", ground.valid],
        "tune": ["--store", ground.store, "--train", ground.rows, "--valid", ground.rows, "--max-length", "400"],
        "embed": ["--shards", ground.photos, "--adapter", ground.vision],
    }[command]
    loop = ["--loop.steps", "3", "--loop.batch", "4", "--loop.lr", "0.01", "--lora.r", "4"]
    more = [] if command == "embed" else loop
    return [command, *map(str, inputs), "--out", str(out), "--model.name", str(ground.base), *more]


def run(*groups: list[str], env: dict[str, str] | None = None) -> None:
    """Runs programs side by side; all must end well."""
    started = [
        subprocess.Popen([sys.executable, *group], env=env or ENV, stderr=subprocess.PIPE, text=True)
        for group in groups
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(groups), said


def by_nproc(argv: list[str], folder: Path) -> None:
    run(["-m", "lavic", *argv, "--nproc", "2"])


def by_torchrun(argv: list[str], folder: Path) -> None:
    meet = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    run(["-m", "torch.distributed.run", "--nproc-per-node", "2", *meet, "--module", "lavic", *argv])


def by_deepspeed(argv: list[str], folder: Path) -> None:
    """Two hosts of one slot; without ssh, the launcher is started on each with its rank."""
    hosts = folder / "hostfile"
    hosts.write_text("first slots=1\nsecond slots=1\n")
    common = ["-m", "deepspeed.launcher.runner", "--hostfile", str(hosts), "--no_ssh", "--no_local_rank"]
    meet = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    run(*([*common, "--node_rank", str(node), *meet, "--module", "lavic", *argv] for node in (0, 1)))


def same(one: Path, other: Path, *files: str) -> None:
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def same_run(one: Path, other: Path, adapter: str) -> None:
    """The same losses and gradients at every step, the same adapter."""

    def curve(folder: Path) -> list[tuple]:
        keys = ("step", "loss", "grad_norm", "valid_loss")
        return [tuple(row.get(key) for key in keys) for row in read_journal(folder / "metrics.jsonl")]

    assert curve(one) == curve(other)
    weights = [load_file(folder / f"bundle/{adapter}/adapter_model.safetensors") for folder in (one, other)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0].keys() | weights[1].keys())


Start = Callable[[list[str], Path], None]


@pytest.fixture(scope="module")
def reference(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What --nproc 2 makes of each command."""
    folder = tmp_path_factory.mktemp("reference")
    for command in ("distill", "tune", "embed"):
        by_nproc(words(command, ground, folder / command), folder)
    by_nproc(evaluate(folder / "tune", ground, folder / "evaluate"), folder)
    return folder


def evaluate(run: Path, ground: Ground, out: Path) -> list[str]:
    inputs = ["--bundle", run / "bundle", "--store", ground.store, "--test", ground.rows, "--out", out]
    return ["evaluate", *map(str, inputs), "--candidates", KEY, "--draws", "50", "--arms", "lavic"]


@pytest.mark.parametrize("start", [by_torchrun, by_deepspeed], ids=["torchrun", "deepspeed"])
def test_distill_is_the_same(start: Start, ground: Ground, reference: Path, tmp_path: Path) -> None:
    start(words("distill", ground, tmp_path / "run"), tmp_path)
    same_run(tmp_path / "run", reference / "distill", "vision_adapter")


def test_tune_is_the_same(ground: Ground, reference: Path, tmp_path: Path) -> None:
    by_torchrun(words("tune", ground, tmp_path / "run"), tmp_path)
    same_run(tmp_path / "run", reference / "tune", "language_adapter")


def test_embed_is_the_same(ground: Ground, reference: Path, tmp_path: Path) -> None:
    by_torchrun(words("embed", ground, tmp_path / "run"), tmp_path)
    names = [path.name for path in (reference / "embed").glob("*.safetensors")]
    assert names
    same(tmp_path / "run", reference / "embed", *names)


def test_evaluate_is_the_same(ground: Ground, reference: Path, tmp_path: Path) -> None:
    by_torchrun(evaluate(reference / "tune", ground, tmp_path / "run"), tmp_path)
    same(tmp_path / "run", reference / "evaluate", "predictions.jsonl")


def test_what_the_deepspeed_launcher_says_is_understood() -> None:
    env = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
    assert World.from_env(env) == World(rank=3, local_rank=1, size=4, local_size=2, node=1, launcher="deepspeed")
