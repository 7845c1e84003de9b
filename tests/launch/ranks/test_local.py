"""Ranks on one machine: their environment, signals and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lavic.cli import start_ranks
from lavic.errors import LaunchError
from lavic.launch.ranks import local

pytestmark = pytest.mark.slow

WRITE_ENVIRONMENT = """
import json, os, sys
names = [name for name in os.environ if name.endswith("RANK") or name.endswith("WORLD_SIZE") or "MASTER" in name]
names += ["OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"]
json.dump({name: os.environ[name] for name in names}, open(f"{sys.argv[1]}.{os.environ['RANK']}", "w"))
"""

# argv: folder, then what each rank does: an exit code, "wait", "stubborn" or "slow".
RANK = """
import os, signal, sys, time
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
action = sys.argv[2 + int(rank)]

def record(number, frame):
    with open(folder / f"signals.{rank}", "a") as file:
        file.write(signal.Signals(number).name + "\\n")
    if action == "wait":
        sys.exit(75)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, record)
(folder / f"pid.{rank}").write_text(str(os.getpid()))
while len(list(folder.glob("pid.*"))) < len(sys.argv) - 2:
    time.sleep(0.01)
if action in ("wait", "stubborn"):
    time.sleep(60)
if action == "slow":
    time.sleep(1)
    (folder / "saved").touch()
    sys.exit(75)
if action == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(action))
"""

LAUNCH = """
import sys
from lavic.launch.ranks import local
sys.exit(local.run("act", sys.argv[2:], len(sys.argv) - 3, program=[sys.executable, sys.argv[1]]))
"""


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("LAVIC_DEVICE", "cpu")


@pytest.fixture
def run_ranks(tmp_path):
    script = tmp_path / "act.py"
    script.write_text(RANK)

    def run(*actions: str, grace_s: float = 5.0) -> int:
        argv = [str(tmp_path), *actions]
        return local.run("act", argv, len(actions), grace_s=grace_s, program=[sys.executable, str(script)])

    return run


def all_ended(folder: Path) -> bool:
    for pid in folder.glob("pid.*"):
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            continue
        return False
    return True


def test_ranks_get_the_variables_of_torchrun(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    script = tmp_path / "tell.py"
    script.write_text(WRITE_ENVIRONMENT)
    assert local.run("tell", [str(tmp_path / "environment")], 2, program=[sys.executable, str(script)]) == 0
    environments = [json.loads((tmp_path / f"environment.{rank}").read_text()) for rank in (0, 1)]
    assert [env.pop("RANK") for env in environments] == ["0", "1"]
    assert [env.pop("LOCAL_RANK") for env in environments] == ["0", "1"]
    assert environments[0] == environments[1]
    assert environments[0].pop("MASTER_PORT").isdigit()
    assert environments[0] == {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
        "GLOO_SOCKET_IFNAME": "lo",
    }


@pytest.mark.parametrize("code", [1, 2, 75])
def test_a_failed_rank_gives_the_exit_code_and_ends_the_others(run_ranks, tmp_path, code):
    start = time.monotonic()
    assert run_ranks("wait", str(code)) == (code if code != 75 else 75)
    assert time.monotonic() - start < 20
    assert all_ended(tmp_path)


def test_exit_code_is_0_if_all_ranks_succeed(run_ranks):
    assert run_ranks("0", "0", "0") == 0


def test_a_rank_that_ignores_sigterm_is_killed(run_ranks, tmp_path):
    assert run_ranks("stubborn", "1", grace_s=0.5) == 1
    assert (tmp_path / "signals.0").read_text() == "SIGTERM\n"
    assert all_ended(tmp_path)


def test_a_killed_rank_is_named(run_ranks, capfd):
    assert run_ranks("wait", "kill") == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL" in capfd.readouterr().err


def test_ranks_that_stop_with_75_are_waited_for(run_ranks, tmp_path):
    """Rank 0 may still write when rank 1 has exited with 75."""
    assert run_ranks("slow", "75") == 75
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "signals.0").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_once(tmp_path, number):
    script = tmp_path / "act.py"
    script.write_text(RANK)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH, str(script), str(tmp_path), "wait", "wait"])
    wait_for(lambda: len(list(tmp_path.glob("pid.*"))) == 2)
    time.sleep(0.2)
    launcher.send_signal(number)
    assert launcher.wait(20) == 75
    assert [(tmp_path / f"signals.{rank}").read_text() for rank in (0, 1)] == [f"{number.name}\n"] * 2


def test_ranks_end_when_the_launcher_is_killed(tmp_path):
    """The ranks install the check for a dead launcher, as every command does."""
    code = (
        "import sys; from lavic.launch.ranks import local\n"
        "program = [sys.executable, '-c', 'from lavic.launch.ranks import local; local._end_with_launcher();'\n"
        '\'import os, sys, time; open(sys.argv[1] + "/pid." + os.environ["RANK"], "w").write(str(os.getpid()));\'\n'
        "'time.sleep(60)']\n"
        "local.run('x', [sys.argv[1]], 2, program=program)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    wait_for(lambda: [pid.read_text() != "" for pid in tmp_path.glob("pid.*")] == [True, True])
    launcher.kill()
    launcher.wait()
    wait_for(lambda: all_ended(tmp_path))


def test_signal_handlers_are_restored(run_ranks):
    before = signal.getsignal(signal.SIGTERM)
    run_ranks("0")
    assert signal.getsignal(signal.SIGTERM) is before


def test_nproc_below_one_is_refused():
    with pytest.raises(LaunchError, match="must be at least 1"):
        local.check_nproc(0)


def test_any_nproc_is_allowed_without_gpus():
    local.check_nproc(64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nproc_beyond_the_gpus_is_refused(monkeypatch):
    monkeypatch.delenv("LAVIC_DEVICE")
    gpus = torch.cuda.device_count()
    local.check_nproc(gpus)
    with pytest.raises(LaunchError, match=f"shows {gpus} GPU"):
        local.check_nproc(gpus + 1)


def test_an_error_of_all_ranks_is_printed_once(capfd):
    assert start_ranks("doctor", ["--nonsense"], 2) == 2
    assert capfd.readouterr().err.count("lavic doctor: error: unknown flag --nonsense") == 1


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
