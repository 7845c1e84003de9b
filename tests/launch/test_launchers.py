"""Two ranks give the same whoever starts them: --nproc, torchrun, srun, or the deepspeed launcher with a hostfile.

The batch scripts, which start ranks by torchrun or srun, are tried in tests/slurm.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lavic.distributed.context import DistributedContext
from lavic.distributed.launcher_env import free_port
from lavic.tracking.journal import read_journal
from tests.slurm.slurm_jobs import Slurm
from tests.train.assets import KEY, Assets, make_assets

pytestmark = pytest.mark.dist
ENV = {"LAVIC_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
STAGES = ("distill", "tune", "embed", "evaluate")
SAME = {"embed": "*.safetensors", "evaluate": "predictions.jsonl", "describe": "*.descriptions.jsonl"}
"""What a command writes, byte for byte the same."""
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do
  [[ $1 == -[oplF] ]] && shift
  shift
done
exec bash -c "${*:2}"
"""
"""Stands in for ssh: drops options and host, and runs the command here."""
ADAPTER = {"distill": "vision_adapter", "tune": "language_adapter"}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    return make_assets(tmp_path_factory.mktemp("assets"))


def words(command: str, assets: Assets, out: Path, bundle: Path) -> list[str]:
    """A command's words, whose results go to `out`; `bundle`: of the tuned one, for `evaluate`."""
    inputs: dict[str, list[object]] = {
        "distill": ["--shards", assets.photos, "--valid", assets.valid],
        "tune": [
            "--store",
            assets.store,
            "--train",
            assets.rows,
            "--valid",
            assets.rows,
            "--max-length",
            400,
        ],
        "embed": ["--shards", assets.photos, "--adapter", assets.vision],
        "describe": ["--shards", out, "--max-new-tokens", 4],
        "evaluate": [
            "--bundle",
            bundle,
            "--store",
            assets.store,
            "--test",
            assets.rows,
            "--candidates",
            KEY,
        ],
    }
    more = ["--draws", "50", "--arms", "lavic"] if command == "evaluate" else ["--model.name", str(assets.base)]
    if command in ADAPTER:
        more += ["--loop.steps", "3", "--loop.global-batch-size", "4", "--loop.lr", "0.01", "--lora.r", "4"]
    if command == "describe":  # writes beside what it reads
        shutil.copytree(assets.photos, out)
    else:
        more += ["--out", str(out)]
    return [command, *map(str, inputs[command]), *more]


def run(*groups: list[str], **env: str) -> None:
    """Runs programs side by side; all must end well."""
    env = {**os.environ, **ENV, **env}
    started = [
        subprocess.Popen([sys.executable, *group], env=env, stderr=subprocess.PIPE, text=True) for group in groups
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
    """Two hosts for `distill`, over ssh and pdsh where that is installed; one host of two slots for the others."""
    hosts = ["first slots=1", "second slots=1"] if argv[0] == "distill" else ["only slots=2"]
    (folder / "hostfile").write_text("\n".join(hosts) + "\n")
    common = ["-m", "deepspeed.launcher.runner", "--hostfile", str(folder / "hostfile"), "--no_local_rank"]
    common += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--module"]
    if len(hosts) > 1 and shutil.which("pdsh"):
        (folder / "ssh").write_text(SSH)
        (folder / "ssh").chmod(0o755)
        run([*common, "lavic", *argv], PATH=f"{folder}:{os.environ['PATH']}")
    else:  # a start on each host
        run(*([*common[:-1], "--no_ssh", "--node_rank", str(n), "--module", "lavic", *argv] for n in range(len(hosts))))


def same(command: str, one: Path, other: Path) -> None:
    """The same files; of a run: losses and gradients at every step, and the adapter."""
    if command in SAME:
        files = [{path.name: path.read_bytes() for path in folder.glob(SAME[command])} for folder in (one, other)]
        assert files[0] and files[0] == files[1]
        return

    def curve(folder: Path) -> list[tuple]:
        keys = ("step", "loss", "grad_norm", "valid_loss")
        return [tuple(row.get(key) for key in keys) for row in read_journal(folder / "metrics.jsonl")]

    assert curve(one) == curve(other)
    weights = [load_file(folder / f"bundle/{ADAPTER[command]}/adapter_model.safetensors") for folder in (one, other)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0].keys() | weights[1].keys())


@pytest.fixture(scope="module")
def reference(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What --nproc 2 makes of each command."""
    folder = tmp_path_factory.mktemp("reference")
    for command in (*STAGES, "describe"):
        by_nproc(words(command, assets, folder / command, folder / "tune" / "bundle"), folder)
    return folder


@pytest.mark.parametrize("start", [by_torchrun, by_deepspeed], ids=["torchrun", "deepspeed"])
@pytest.mark.parametrize("command", STAGES)
def test_the_result_is_the_same(
    command: str,
    start: Callable[[list[str], Path], None],
    assets: Assets,
    reference: Path,
    tmp_path: Path,
) -> None:
    start(words(command, assets, tmp_path / "out", reference / "tune" / "bundle"), tmp_path)
    same(command, tmp_path / "out", reference / command)


@pytest.mark.slurm
def test_it_is_the_same_by_srun(slurm: Slurm, assets: Assets, reference: Path, tmp_path: Path) -> None:
    """As docs/slurm.md has it: one task for each rank, and nothing else; here on two nodes."""
    commands = ("tune", "embed", "evaluate", "describe")
    lines = ["#!/bin/bash", "set -e", "export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))"]
    for command in commands:
        argv = words(command, assets, tmp_path / command, reference / "tune" / "bundle")
        start = ["srun", "--nodes", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]
        lines.append(shlex.join([*start, sys.executable, "-m", "lavic", *argv]))
    (tmp_path / "job.sh").write_text("\n".join(lines) + "\n")
    options = ("--nodes=2", "--ntasks-per-node=1", "--output=lavic-%j.log")
    job = slurm.submit(*options, tmp_path / "job.sh", cwd=tmp_path, **ENV)
    assert job.wait() == 0, job.log
    for command in commands:
        same(command, tmp_path / command, reference / command)


def test_what_the_deepspeed_launcher_says_is_understood() -> None:
    env = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
    assert DistributedContext.from_env(env) == DistributedContext(
        rank=3, local_rank=1, size=4, local_world_size=2, node_rank=1, launcher="deepspeed"
    )
