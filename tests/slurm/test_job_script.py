"""`slurm/job.sh` with a small program in the place of lavic: arrays, tasks of a node, files of a site."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.slurm.slurm_jobs import Slurm, wait_for

SCRIPTS = Path(__file__).parents[2] / "slurm"
pytestmark = pytest.mark.slurm

RANK = """#!{python}
import os, pathlib, signal, sys, time
if sys.argv[1] == "-c":
    sys.exit(0)
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
task, step_cpus = os.environ.get("SLURM_ARRAY_TASK_ID", ""), os.environ.get("SLURM_CPUS_PER_TASK")
print("rank of task", task, "with", step_cpus, "CPUs:", *sys.argv[-2:], flush=True)
while pathlib.Path("hold").exists() and not stopped:
    time.sleep(0.05)
sys.exit(75 if stopped else 0)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a program that takes the place of Python and lavic; it runs while the file `hold` exists."""
    program = tmp_path / "rank"
    program.write_text(RANK.format(python=sys.executable))
    program.chmod(0o755)
    return tmp_path


def variables(site: Path, **more: str) -> dict[str, str]:
    names = {"LAVIC_PYTHON": str(site / "rank"), "LAVIC_PREFLIGHT": "0", "LAVIC_VENV": str(site / "none")}
    return {**names, "RANKS_PER_NODE": "1", **more}


def test_a_stopped_task_of_an_array_is_requeued_alone(slurm: Slurm, site: Path) -> None:
    """The last task that SLURM starts has the id of the whole array."""
    (site / "hold").touch()
    options = ("--array=0-2", "--output=task-%a.log", "--cpus-per-task=1", "--gpus-per-node=0")
    job = slurm.submit(*options, SCRIPTS / "gpu.sbatch", "tune", "@TASK@", cwd=site, **variables(site))
    logs = [site / f"task-{task}.log" for task in range(3)]

    def all_run() -> bool:
        return all(log.exists() and "rank of task" in log.read_text() for log in logs)

    wait_for(all_run, 60, "three tasks")
    listed = slurm.run("squeue", "--array", "--noheader", f"--jobs={job.number}", "--format=%A %i").stdout.split()
    own_id = dict(zip(listed[::2], listed[1::2], strict=True))[str(job.number)]
    last = int(own_id.partition("_")[2])
    assert slurm.run("scancel", "--batch", "--signal=USR1", own_id).returncode == 0
    wait_for(lambda: "stopped and requeued: restart 1" in logs[last].read_text(), 60, "the task to stop")
    states = slurm.run("squeue", "--array", "--noheader", f"--jobs={job.number}", "--format=%i %T").stdout.split()
    assert [state for id, state in zip(states[::2], states[1::2], strict=True) if id != own_id] == ["RUNNING"] * 2
    (site / "hold").unlink()
    others = [log for log in logs if log != logs[last]]
    wait_for(lambda: all(log.read_text().endswith(" done\n") for log in others), 60, "the other tasks to end")
    assert all("asking the ranks" not in log.read_text() for log in others)
    slurm.run("scancel", str(job.number))


def test_ranks_get_the_cores_of_all_tasks_of_a_node(slurm: Slurm, site: Path) -> None:
    options = ("--ntasks-per-node=4", "--cpus-per-task=2", "--gpus-per-node=0", "--nodes=1")
    job = slurm.submit(*options, SCRIPTS / "gpu.sbatch", "tune", "x", cwd=site, **variables(site))
    assert job.wait(60) == 0, job.log
    assert "with 8 CPUs: tune x" in job.log


def test_files_of_a_site_may_use_unset_variables_and_see_no_arguments(slurm: Slurm, site: Path) -> None:
    """As `module load` and conda's `activate` do, which otherwise takes the command for an environment's name."""
    (site / "venv" / "bin").mkdir(parents=True)
    (site / "venv" / "bin" / "activate").write_text('echo "activated: $# arguments, $NOT_SET"\n')
    (site / "env.sh").write_text(f'export PATH=$PATH:$NOT_SET_EITHER\nsource "{SCRIPTS}/env.sh"\n')
    names = variables(site, LAVIC_ENV=str(site / "env.sh"), LAVIC_VENV=str(site / "venv"))
    words = ("cpu.sbatch", "verify", "a folder")
    job = slurm.submit("--cpus-per-task=1", SCRIPTS / words[0], *words[1:], cwd=site, **names)
    assert job.wait(60) == 0, job.log
    assert "activated: 0 arguments, \n" in job.log and "verify a folder" in job.log
