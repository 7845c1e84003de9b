"""Two ranks give the same results by --nproc, torchrun, srun and the deepspeed launcher with a hostfile.

Each launcher runs one command as documented, and the others in one launch (`run_commands`): a rank takes seconds to
start. The batch scripts, which start ranks by torchrun or srun, are tested in tests/slurm.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lavic.distributed.context import DistributedContext
from lavic.distributed.launcher_env import free_port
from lavic.tracking.journal import read_journal
from tests.fork_server import ForkServer
from tests.slurm.slurm_jobs import Slurm
from tests.train.assets import KEY, Assets, make_assets

pytestmark = pytest.mark.dist
ENV = {
    "LAVIC_DEVICE": "cpu",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": str(Path(__file__).parents[2]),  # for `run_commands`
}
STAGES = ("distill", "tune", "embed", "evaluate")
IDENTICAL_FILES = {"embed": "*.safetensors", "evaluate": "predictions.jsonl", "describe": "*.descriptions.jsonl"}
"""Files that a command writes with identical bytes."""
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do
  [[ $1 == -[oplF] ]] && shift
  shift
done
exec bash -c "${*:2}"
"""
"""Stands in for ssh: drops options and host, and runs the command here."""
ADAPTER_FOLDER = {"distill": "vision_adapter", "tune": "language_adapter"}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    return make_assets(tmp_path_factory.mktemp("assets"))


def command_argv(command: str, assets: Assets, out: Path, bundle: Path) -> list[str]:
    """Arguments of a command that writes to `out`; `bundle` is the tuned bundle, for `evaluate`."""
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
    options = ["--draws", "50", "--arms", "lavic"] if command == "evaluate" else ["--model.name", str(assets.base)]
    if command in ADAPTER_FOLDER:
        options += ["--loop.steps", "3", "--loop.global-batch-size", "4", "--loop.lr", "0.01", "--lora.r", "4"]
    if command == "describe":  # it writes into its input folder
        shutil.copytree(assets.photos, out)
    else:
        options += ["--out", str(out)]
    return [command, *map(str, inputs[command]), *options]


def run(*groups: list[str], **env: str) -> None:
    """Runs programs in parallel; all must exit with 0."""
    env = {**os.environ, **ENV, **env}
    started = [
        subprocess.Popen([sys.executable, *group], env=env, stderr=subprocess.PIPE, text=True) for group in groups
    ]
    try:
        errors = [process.communicate(timeout=500)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(groups), errors


def run_commands(commands: Iterable[list[str]], file: Path) -> list[str]:
    """The module, with its arguments, that runs commands one after the other; writes them to `file`."""
    file.write_text(json.dumps(list(commands)))
    return ["tests.launch.run_commands", str(file)]


def by_torchrun(module: list[str], folder: Path) -> None:
    rendezvous = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    run(["-m", "torch.distributed.run", "--nproc-per-node", "2", *rendezvous, "--module", *module])


def by_deepspeed(module: list[str], folder: Path) -> None:
    """Two hosts for `lavic`, over pdsh and ssh if pdsh is installed; one host with two slots for `run_commands`."""
    hosts = ["first slots=1", "second slots=1"] if module[0] == "lavic" else ["only slots=2"]
    (folder / "hostfile").write_text("\n".join(hosts) + "\n")
    common = ["-m", "deepspeed.launcher.runner", "--hostfile", str(folder / "hostfile"), "--no_local_rank"]
    common += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--module"]
    if len(hosts) > 1 and shutil.which("pdsh"):
        (folder / "ssh").write_text(SSH)
        (folder / "ssh").chmod(0o755)
        run([*common, *module], PATH=f"{folder}:{os.environ['PATH']}")
    else:  # one launcher per host
        run(*([*common[:-1], "--no_ssh", "--node_rank", str(n), "--module", *module] for n in range(len(hosts))))


def assert_same_results(command: str, folder_a: Path, folder_b: Path) -> None:
    """Compares files; of training runs, losses and gradient norms of every step, and the adapter."""
    if command in IDENTICAL_FILES:
        files = [
            {path.name: path.read_bytes() for path in folder.glob(IDENTICAL_FILES[command])}
            for folder in (folder_a, folder_b)
        ]
        assert files[0] and files[0] == files[1]
        return

    def curve(folder: Path) -> list[tuple]:
        keys = ("step", "loss", "grad_norm", "valid_loss")
        return [tuple(row.get(key) for key in keys) for row in read_journal(folder / "metrics.jsonl")]

    assert curve(folder_a) == curve(folder_b)
    weights = [
        load_file(folder / f"bundle/{ADAPTER_FOLDER[command]}/adapter_model.safetensors")
        for folder in (folder_a, folder_b)
    ]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0].keys() | weights[1].keys())


@pytest.fixture(scope="module")
def reference(assets: Assets, tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """Results of each command with two ranks that no launcher has started."""
    folder = tmp_path_factory.mktemp("reference")
    for command in (*STAGES, "describe"):
        argv = command_argv(command, assets, folder / command, folder / "tune" / "bundle")
        done = fork_server.lavic(*argv, ranks=2)
        assert done.returncode == 0, done.stderr
    return folder


LAUNCHERS = {"torchrun": (by_torchrun, "embed"), "deepspeed": (by_deepspeed, "distill")}
"""How to start a module, and the command that is started as documented."""


@pytest.fixture(scope="module", params=LAUNCHERS)
def results(
    request: pytest.FixtureRequest, assets: Assets, reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Results of each stage by a launcher, which is started twice."""
    folder = tmp_path_factory.mktemp(request.param)
    start, documented = LAUNCHERS[request.param]
    argvs = {
        command: command_argv(command, assets, folder / command, reference / "tune" / "bundle") for command in STAGES
    }
    start(["lavic", *argvs.pop(documented)], folder)
    start(run_commands(argvs.values(), folder / "commands.json"), folder)
    return folder


@pytest.mark.parametrize("command", STAGES)
def test_torchrun_and_deepspeed_give_the_same_results(command: str, results: Path, reference: Path) -> None:
    assert_same_results(command, results / command, reference / command)


def test_nproc_gives_the_same_results(assets: Assets, reference: Path, tmp_path: Path) -> None:
    run(["-m", "lavic", *command_argv("tune", assets, tmp_path / "out", tmp_path), "--nproc", "2"])
    assert_same_results("tune", tmp_path / "out", reference / "tune")


@pytest.mark.slurm
def test_srun_gives_the_same_results(slurm: Slurm, assets: Assets, reference: Path, tmp_path: Path) -> None:
    """As in docs/slurm.md: one task per rank; here on two nodes."""
    commands = ("embed", "tune", "evaluate", "describe")
    argvs = [command_argv(command, assets, tmp_path / command, reference / "tune" / "bundle") for command in commands]
    lines = ["#!/bin/bash", "set -e", "export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))"]
    for module in (["lavic", *argvs[0]], run_commands(argvs[1:], tmp_path / "commands.json")):
        start = ["srun", "--nodes", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]
        lines.append(shlex.join([*start, sys.executable, "-m", *module]))
    (tmp_path / "job.sh").write_text("\n".join(lines) + "\n")
    options = ("--nodes=2", "--ntasks-per-node=1", "--output=lavic-%j.log")
    job = slurm.submit(*options, tmp_path / "job.sh", cwd=tmp_path, **ENV)
    assert job.wait() == 0, job.log
    for command in commands:
        assert_same_results(command, tmp_path / command, reference / command)


def test_variables_of_the_deepspeed_launcher_are_read() -> None:
    env = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
    assert DistributedContext.from_env(env) == DistributedContext(
        rank=3, local_rank=1, size=4, local_world_size=2, node_rank=1, launcher="deepspeed"
    )
