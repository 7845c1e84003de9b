"""`sbatch slurm/train.sbatch` on two nodes: to its end, stopped and requeued, and with a rank killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lavic.journal import read_journal
from tests.slurm.cluster import Job, Slurm, wait_for
from tests.train.ground import Ground

SCRIPTS = Path(__file__).parents[2] / "slurm"
STEPS = 100
pytestmark = pytest.mark.slurm


def settings(**more: str) -> dict[str, str]:
    """One rank on each node, on the CPU, with this interpreter's lavic."""
    return {
        "LAVIC_VENV": sys.prefix,
        "LAVIC_PYTHON": sys.executable,
        "LAVIC_DEVICE": "cpu",
        "RANKS_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
        "LAVIC_PREFLIGHT": "0",
        **more,
    }


def distill(ground: Ground, out: Path, steps: int) -> list[str]:
    words = ["distill", "--shards", ground.photos, "--valid", ground.valid, "--out", out, "--model.name", ground.base]
    loop = {"steps": steps, "batch": 4, "lr": 0.01, "save-every": 5}
    return [*map(str, words), *(f"--loop.{k}={v}" for k, v in loop.items()), "--lora.r", "4"]


def steps(out: Path) -> list[int]:
    return [row["step"] for row in read_journal(out / "metrics.jsonl") if "loss" in row]


def adapter(out: Path) -> dict[str, list]:
    return {name: t.tolist() for name, t in load_file(out / "bundle/vision_adapter/adapter_model.safetensors").items()}


def frozen(job: Job, out: Path) -> dict[int, int]:
    """Waits until the job's training has made a checkpoint, and holds its ranks there; their process ids."""
    wait_for(lambda: list(out.glob("checkpoints/step-*")) or job.ended, 240, "a checkpoint")
    found = ranks(out)
    for pid in found.values():
        os.kill(pid, signal.SIGSTOP)
    assert not (out / "result.json").exists(), job.log
    return found


def ranks(out: Path) -> dict[int, int]:
    """Process ids of a run's ranks, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            env = dict(pair.split(b"=", 1) for pair in (folder / "environ").read_bytes().split(b"\0") if b"=" in pair)
        except OSError:
            continue
        # a rank's monitor and its loader workers have its environment too; the rank itself was there first
        if str(out).encode() in words and b"lavic.launch.local" in words and b"RANK" in env:
            rank = int(env[b"RANK"])
            found[rank] = min(int(folder.name), found.get(rank, sys.maxsize))
    return found


@pytest.fixture(scope="module")
def whole(slurm: Slurm, ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run over two nodes, one rank on each, ZeRO-2; with the look at the nodes before it."""
    folder = tmp_path_factory.mktemp("whole")
    words = distill(ground, folder / "run", STEPS)
    job = slurm.submit(SCRIPTS / "train.sbatch", *words, cwd=folder, **settings(LAVIC_PREFLIGHT="200"))
    assert job.wait() == 0, job.log
    assert "preflight: 2 nodes well; all-reduce in" in job.log
    return folder / "run"


def test_stopped_in_the_middle_it_goes_on_to_the_same_adapter(
    slurm: Slurm, ground: Ground, whole: Path, tmp_path: Path
) -> None:
    """The warning comes as before a time limit: to the batch script alone."""
    cut = tmp_path / "cut"
    stopped = slurm.submit(SCRIPTS / "train.sbatch", *distill(ground, cut, STEPS), cwd=tmp_path, **settings())
    held = frozen(stopped, cut)
    slurm.run("scancel", "--batch", "--signal=USR1", str(stopped.number))
    stopped.wait_until("asking the ranks to save and leave")
    for pid in held.values():
        os.kill(pid, signal.SIGCONT)
    stopped.wait_until("queued again, restart 1 of at most 100")
    assert not (cut / "result.json").exists()
    before = steps(cut)
    assert 5 <= before[-1] < STEPS
    assert stopped.wait() == 0, stopped.log
    assert stopped.restarts == 1 and "going on after step" in stopped.log
    assert steps(cut) == list(range(1, STEPS + 1))
    assert adapter(cut) == adapter(whole)
    logs = [tmp_path / "logs" / f"{stopped.number}-{start}.log" for start in (0, 1)]
    for log in logs:
        assert log.read_text() in stopped.log, f"{log.read_text()}\n--- is not in ---\n{stopped.log}"


def test_a_killed_rank_is_named_and_the_run_goes_on_on_one_node(slurm: Slurm, ground: Ground, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = distill(ground, out, 2000)
    job = slurm.submit(SCRIPTS / "train.sbatch", *words, cwd=tmp_path, **settings())
    held = frozen(job, out)
    os.kill(held[1], signal.SIGKILL)
    killed = time.monotonic()
    os.kill(held[0], signal.SIGCONT)
    assert job.wait(60) == 128 + signal.SIGKILL, job.log
    assert time.monotonic() - killed < 60
    assert "rank 1 on n2 was ended by SIGKILL" in job.log
    assert "queued again" not in job.log and job.restarts == 0
    assert not (out / "result.json").exists()
    done = max(int(path.name[5:]) for path in out.glob("checkpoints/step-*") if (path / "COMPLETE").exists())

    stop = tmp_path / "stop"
    again = slurm.submit(
        "--nodes=1", SCRIPTS / "train.sbatch", *words, cwd=tmp_path, **settings(LAVIC_STOP_FILE=str(stop))
    )
    again.wait_until(f"going on after step {done} of 2000")
    stop.touch()
    assert again.wait() == 75, again.log
    assert "not queued again while" in again.log and again.restarts == 0
    assert steps(out)[-1] > done


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_wrong_input_is_said_and_nothing_is_requeued(
    slurm: Slurm, ground: Ground, tmp_path: Path, launcher: str
) -> None:
    words = [*distill(ground, tmp_path / "run", 5), "--shards", "nowhere"]
    job = slurm.submit(SCRIPTS / "train.sbatch", *words, cwd=tmp_path, **settings(LAVIC_LAUNCHER=launcher))
    assert job.wait() == 2, job.log
    assert "nowhere: no such folder of shards" in job.log
    assert "Traceback" not in job.log and "queued again" not in job.log
    assert job.restarts == 0


def test_bare_srun_gives_the_same(slurm: Slurm, ground: Ground, whole: Path, tmp_path: Path) -> None:
    """One task for each rank instead of torchrun; then embed's ranks, sharing the shards over both nodes."""
    out, more = tmp_path / "run", settings(LAVIC_LAUNCHER="srun")
    job = slurm.submit(SCRIPTS / "train.sbatch", *distill(ground, out, STEPS), cwd=tmp_path, **more)
    assert job.wait() == 0, job.log
    assert adapter(out) == adapter(whole)
    words = ["embed", "--shards", ground.photos, "--adapter", ground.vision, "--model.name", ground.base]
    store = tmp_path / "store"
    job = slurm.submit("--nodes=2", SCRIPTS / "embed.sbatch", *map(str, [*words, "--out", store]), cwd=tmp_path, **more)
    assert job.wait() == 0, job.log
    assert "24 items" in job.log and (store / "manifest.json").exists()
