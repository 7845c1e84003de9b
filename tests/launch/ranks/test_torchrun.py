"""torchrun on one node of a job: signals, exit codes and messages about its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lavic.distributed.launcher_env import free_port

pytestmark = pytest.mark.dist

# argv: folder, then what each rank does.
RANK = """
import os, signal, sys, time
from pathlib import Path

from lavic.distributed.signals import StopRequest

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
action = sys.argv[2 + int(rank)]
(folder / f"begun.{rank}").touch()
if action == "stop":
    while not (folder / "warned").exists():
        time.sleep(0.05)  # loading a model, without signal handlers
    with StopRequest() as stop:
        until = time.monotonic() + 30
        while not stop.requested and time.monotonic() < until:
            time.sleep(0.05)
    os._exit(75 if stop.requested else 3)
if action == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if action == "wait":
    time.sleep(60)
sys.exit(int(action))
"""


@pytest.fixture
def start_ranks(tmp_path: Path):
    """Starts the ranks of one node."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    started: list[subprocess.Popen[str]] = []

    def run(*actions: str) -> subprocess.Popen[str]:
        rendezvous = ["--nnodes", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        command = [sys.executable, "-m", "lavic.launch.ranks.torchrun", *rendezvous]
        command += ["--nproc-per-node", str(len(actions))]
        env = {**os.environ, "SLURM_NODEID": "0", "SLURMD_NODENAME": "gpu07", "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                [*command, str(script), str(tmp_path), *actions], env=env, stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def test_sigusr1_to_torchrun_reaches_ranks_that_are_loading(start_ranks, tmp_path) -> None:
    """Many sites deliver a signal to the first process of a task only."""
    process = start_ranks("stop", "stop")
    wait_for(lambda: len(list(tmp_path.glob("begun.*"))) == 2)
    process.send_signal(signal.SIGUSR1)
    time.sleep(1)
    assert process.poll() is None
    (tmp_path / "warned").touch()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 75, error
    assert "rank" not in error


def test_a_killed_rank_is_named_with_its_node(start_ranks) -> None:
    process = start_ranks("wait", "kill")
    error = process.communicate(timeout=90)[1]
    assert process.returncode == 128 + signal.SIGKILL
    assert "lavic: rank 1 on gpu07 was killed by SIGKILL (out of memory?)" in error


def test_the_exit_code_is_that_of_the_failed_rank(start_ranks) -> None:
    process = start_ranks("2", "wait")
    error = process.communicate(timeout=90)[1]
    assert process.returncode == 2
    assert "lavic: rank 0 on gpu07 exited with code 2" in error
    assert "Traceback" not in error


def test_the_flags_of_a_rank_are_not_those_of_torchrun(tmp_path) -> None:
    """Also where they begin as torchrun's do, such as --nproc."""
    (tmp_path / "rank_module.py").write_text("import sys\nprint('rank:', *sys.argv[1:])\n")
    words = ["--nproc", "8", "--run", "a", "--", "-m", "b c"]
    command = [sys.executable, "-m", "lavic.launch.ranks.torchrun", "--nnodes", "1", "--nproc-per-node", "1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--module", "rank_module", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"rank: {' '.join(words)}\n"


def test_waiting_for_other_nodes_is_logged() -> None:
    rendezvous = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    code = "import lavic.launch.ranks.torchrun as t; t.FIRST_S = 0.2; t.main()"
    command = [sys.executable, "-c", code, *rendezvous, "--module", "lavic"]
    env = {**os.environ, "SLURM_NODEID": "0", "SLURMD_NODENAME": "gpu07"}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert any(line.startswith("lavic: gpu07: waiting for the other nodes") for line in process.stderr)
        process.terminate()
    assert process.returncode == -signal.SIGTERM
