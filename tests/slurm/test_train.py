"""`sbatch slurm/gpu.sbatch` on two nodes: to its end, stopped and requeued, and with a rank killed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from lavic.config.cli_args import to_args
from lavic.tracking.journal import read_journal
from tests.slurm.slurm_jobs import Job, Slurm, wait_for
from tests.train.assets import Assets

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


def training(assets: Assets, steps: int) -> dict[str, Any]:
    """Settings of a training that is short."""
    loop = {"steps": steps, "global_batch_size": 4, "lr": 0.01, "save_every": 5}
    return {"model": {"name": str(assets.base)}, "loop": loop, "lora": {"r": 4}}


def distill(assets: Assets, out: Path, steps: int) -> list[str]:
    words = ["distill", "--shards", str(assets.photos), "--valid", str(assets.valid), "--out", str(out)]
    return [*words, *to_args(training(assets, steps))]


def steps(out: Path) -> list[int]:
    return [row["step"] for row in read_journal(out / "metrics.jsonl") if "loss" in row]


def adapter(out: Path) -> dict[str, list]:
    return {name: t.tolist() for name, t in load_file(out / "bundle/vision_adapter/adapter_model.safetensors").items()}


def frozen(job: Job, out: Path, after: int = 0) -> dict[int, int]:
    """Waits until the job's training has made a checkpoint beyond a step, and holds its ranks there; their pids."""

    def has_checkpoint() -> bool:
        return any(int(path.name[5:]) > after for path in out.glob("checkpoints/step-*"))

    wait_for(lambda: has_checkpoint() or job.ended, 240, "a checkpoint")
    pids = ranks(out)
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    assert not (out / "result.json").exists(), job.log
    return pids


def released(frozen_ranks: dict[int, int]) -> None:
    """Lets held ranks go on."""
    for pid in frozen_ranks.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def whole_checkpoint(out: Path) -> int:
    """Step of the newest checkpoint that is whole."""
    return max(int(path.name[5:]) for path in out.glob("checkpoints/step-*") if (path / "COMPLETE").exists())


def ranks(out: Path) -> dict[int, int]:
    """Process ids of a run's ranks, by rank."""
    pids = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            env = dict(pair.split(b"=", 1) for pair in (folder / "environ").read_bytes().split(b"\0") if b"=" in pair)
        except OSError:
            continue
        # a rank's monitor and its loader workers have its environment too; the rank itself was there first
        if str(out).encode() in words and b"lavic.launch.ranks.local" in words and b"RANK" in env:
            rank = int(env[b"RANK"])
            pids[rank] = min(int(folder.name), pids.get(rank, sys.maxsize))
    return pids


def manual() -> list[str]:
    """The lines that docs/slurm.md begins with, for a cluster whose partition is `main`."""
    text = (SCRIPTS.parent / "docs" / "slurm.md").read_text()
    return text.split("```bash\n")[1].split("```")[0].replace("PARTITION", "main").splitlines()


@pytest.fixture(scope="module")
def site(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone of ours, with small photos and settings in the place of the real ones."""
    folder = tmp_path_factory.mktemp("a site")
    (folder / "slurm").symlink_to(SCRIPTS)
    (folder / "shards").mkdir()
    (folder / "shards" / "train").symlink_to(assets.photos)
    (folder / "shards" / "valid").symlink_to(assets.valid)
    (folder / "distill-7b-8gpu").write_text(yaml.safe_dump(training(assets, STEPS)))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(slurm: Slurm, site: Path) -> Path:
    """An undisturbed run over two nodes, one rank on each, ZeRO-2; started as the manual says."""
    (line,) = [line for line in manual() if "distill" in line]
    job = slurm.typed(line, site, **settings())
    assert job.wait() == 0, job.log
    assert "1 ranks per node, 2 nodes" in job.log
    return site / "runs" / "distill"


def test_from_nothing_to_a_running_job(slurm: Slurm, site: Path, uninterrupted: Path) -> None:
    """Each line of ten that the manual hands to SLURM, as a shell reads it."""
    lines = manual()
    assert len(lines) <= 10
    assert (uninterrupted / "bundle" / "bundle.json").is_file()
    (preflight,) = [line for line in lines if "preflight" in line]
    job = slurm.typed(preflight, site, **settings(LAVIC_PREFLIGHT="200"))
    assert job.wait() == 0, job.log
    assert "preflight: 2 nodes passed; all-reduce in" in job.log
    (demo,) = [line for line in lines if " demo " in line]
    job = slurm.typed(demo.partition("#")[0] + " --help", site, **settings())  # a demo takes minutes
    assert job.wait() == 0, job.log
    assert "usage: lavic demo" in job.log
    assert sum("sbatch" in line for line in lines) == 3


def test_stopped_in_every_way_it_goes_on_to_the_same_adapter(
    slurm: Slurm, assets: Assets, uninterrupted: Path, tmp_path: Path
) -> None:
    """By its time limit, by `scontrol requeue`, and by a signal to its steps; queued again each time."""
    cut = tmp_path / "cut"
    job = slurm.submit("--nodes=2", SCRIPTS / "gpu.sbatch", *distill(assets, cut, STEPS), cwd=tmp_path, **settings())
    frozen_ranks = frozen(job, cut)
    # SLURM itself warns the batch script, which asks for that three minutes before the end; it looks twice a minute.
    job.change(TimeLimit=3)
    job.wait_until("asking the ranks to save and stop")
    released(frozen_ranks)
    job.wait_until("requeued: restart 1 of at most 100")
    assert not (cut / "result.json").exists()
    reached = [steps(cut)[-1]]

    job.start_now(TimeLimit=60)
    frozen_ranks = frozen(job, cut, reached[-1])
    assert slurm.run("scontrol", "requeue", str(job.number)).returncode == 0
    released(frozen_ranks)  # to find SIGTERM waiting, and KillWait to save in
    wait_for(lambda: job.state == "PENDING", 60, "the job in the queue", every=0.3)
    reached.append(steps(cut)[-1])

    job.start_now()
    frozen_ranks = frozen(job, cut, reached[-1])
    slurm.run("scancel", "--signal=USR1", str(job.number))
    released(frozen_ranks)
    job.wait_until("requeued: restart 3 of at most 100")
    reached.append(steps(cut)[-1])

    job.start_now()
    assert job.wait() == 0, job.log
    assert job.restarts == 3
    assert 5 <= reached[0] < reached[1] < reached[2] < STEPS
    assert all(f"resuming after step {step} of {STEPS}" in job.log for step in reached), (reached, job.log)
    assert steps(cut) == list(range(1, STEPS + 1))
    assert adapter(cut) == adapter(uninterrupted)
    for start in range(4):
        log = (tmp_path / "logs" / f"{job.number}-{start}.log").read_text().splitlines()
        assert log and not set(log) - set(job.log.splitlines())


def test_a_killed_rank_is_named_and_a_dead_node_left_behind(slurm: Slurm, assets: Assets, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = distill(assets, out, 2000)
    job = slurm.submit("--nodes=2", SCRIPTS / "gpu.sbatch", *words, cwd=tmp_path, **settings())
    frozen_ranks = frozen(job, out)
    os.kill(frozen_ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    released(frozen_ranks)
    assert job.wait(60) == 128 + signal.SIGKILL, job.log
    assert time.monotonic() - killed < 60
    assert "rank 1 on n2 was killed by SIGKILL" in job.log
    assert "requeued" not in job.log and job.restarts == 0
    assert not (out / "result.json").exists()
    done = whole_checkpoint(out)

    # Submitted again, it goes on; then its second node dies, which the first does not notice: the power is gone.
    stop = tmp_path / "stop"
    variables = settings(LAVIC_STOP_FILE=str(stop))
    again = slurm.submit("--nodes=2", SCRIPTS / "gpu.sbatch", *words, cwd=tmp_path, **variables)
    frozen_ranks = frozen(again, out, done)
    assert f"resuming after step {done} of 2000" in again.log
    slurm.lose_node("n2")
    try:
        wait_for(lambda: again.restarts == 1 and again.state == "PENDING", 120, "SLURM to queue it again", every=0.3)
        done = whole_checkpoint(out)
        # On fewer nodes, as docs/slurm.md has it.
        again.change(NumNodes=1, NumTasks=1, NumCPUs=64)
        again.start_now()
        again.wait_until(f"resuming after step {done} of 2000")
        stop.touch()
        assert again.wait() == 75, again.log
        assert "1 ranks per node, 1 nodes" in again.log and "not requeued while" in again.log
        assert steps(out)[-1] > done
    finally:
        slurm.start_node("n2")
        wait_for(slurm.idle, 60, "both nodes", every=0.3)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_wrong_input_is_said_and_nothing_is_requeued(
    slurm: Slurm, assets: Assets, tmp_path: Path, launcher: str
) -> None:
    words = [*distill(assets, tmp_path / "run", 5), "--shards", "nowhere"]
    job = slurm.submit("--nodes=2", SCRIPTS / "gpu.sbatch", *words, cwd=tmp_path, **settings(LAVIC_LAUNCHER=launcher))
    assert job.wait() == 2, job.log
    assert "nowhere: no such folder of shards" in job.log
    assert "Traceback" not in job.log and "requeued" not in job.log
    assert job.restarts == 0


def test_one_task_for_each_rank_gives_the_same(
    slurm: Slurm, assets: Assets, uninterrupted: Path, tmp_path: Path
) -> None:
    """Without torchrun."""
    out = tmp_path / "run"
    words = distill(assets, out, STEPS)
    job = slurm.submit("--nodes=2", SCRIPTS / "gpu.sbatch", *words, cwd=tmp_path, **settings(LAVIC_LAUNCHER="srun"))
    assert job.wait() == 0, job.log
    assert adapter(out) == adapter(uninterrupted)
