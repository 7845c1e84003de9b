"""`lavic submit logs`: prints the log of a step's job, and follows it."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import PositiveInt

from lavic.config import Positional, parse, settings
from lavic.errors import ConfigError, LaunchError
from lavic.launch.pipeline.dag import Layout
from lavic.launch.pipeline.job_registry import Job
from lavic.launch.slurm.client import JobState
from lavic.launch.slurm.log_file import follow
from lavic.launch.submit.status import (
    POLL_S,
    flag_trailing_args,
    last_known_jobs,
    read_pipeline,
    select_names,
    select_tasks,
    sweep_tasks,
)
from lavic.launch.sweep.arrays import TaskStatus

DESCRIPTION = """Prints the end of the log of a step's last job: of the named step, else of the running one, else of the
one that wrote last. Of a sweep a name is a cell, a stage, or both.

  lavic submit logs /shared/amazon
  lavic submit logs /shared/amazon distill -f
  lavic submit logs /shared/lavic tune-all_beauty-st-0"""


log = logging.getLogger(__name__)


@settings
class Settings:
    """Which log, and how much of it."""

    out: Annotated[Path, Positional]
    """The pipeline's folder."""
    step: str | None = None
    """A step or stage, or a cell of a sweep, also without the flag after OUT."""
    lines: PositiveInt = 40
    """Number of lines, counted from the end."""
    follow: bool = False
    """Or -f: also print new lines, until the job has ended."""


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    args = [arg for arg in argv if arg != "-f"]
    args = [*flag_trailing_args(args, "--step"), *(["--follow"] if "-f" in argv else [])]
    chosen = parse(Settings, args, command="submit logs", description=DESCRIPTION)
    _, steps = read_pipeline(chosen.out)
    out = Layout(chosen.out).out
    requested = (chosen.step,) if chosen.step else ()
    tasks = select_tasks(_tasks(out), requested)
    names = [] if requested and tasks else select_names(steps, requested)
    jobs = {name: job for name, job in last_known_jobs(out).items() if name in names}
    job = _select_job(jobs | {f"{task.stage}-{task.cell}": _task_job(task) for task in tasks if task.job})
    if job is None:
        raise ConfigError(f"{chosen.step or out}: no job has been submitted")
    file = Path(job.log)
    print(f"== {file}", file=sys.stderr)
    if not file.is_file() and not chosen.follow:
        print(f"no log yet: job {job.id} is {job.seen.state}", file=sys.stderr)
        return 0
    end = _print_tail(file, chosen.lines)
    if chosen.follow:
        for data in follow(file, end, lambda: _is_active(out, job.id), poll_s=POLL_S):
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
    return 0


def _select_job(jobs: dict[str, Job]) -> Job | None:
    """The job that runs, else the one that wrote last, else the first."""

    def written(job: Job) -> float:
        log = Path(job.log)
        return log.stat().st_mtime if log.is_file() else 0.0

    running = [job for job in jobs.values() if job.seen.active and job.seen.state != "PENDING"]
    candidates = running or list(jobs.values())
    return max(candidates, key=written) if candidates else None


def _print_tail(log: Path, count: int) -> int:
    """Prints the last lines; returns the file's size."""
    if not log.is_file():
        return 0
    with log.open("rb") as file:
        for line in deque(file, count):
            sys.stdout.buffer.write(line)
        sys.stdout.flush()
        return file.tell()


def _is_active(out: Path, id: str) -> bool:
    jobs = [*last_known_jobs(out).values(), *map(_task_job, _tasks(out))]
    return any(job.id == id and job.seen.active for job in jobs)


def _tasks(out: Path) -> list[TaskStatus]:
    """A sweep's tasks; where SLURM does not answer, as if all had ended."""
    try:
        return sweep_tasks(out)
    except LaunchError as error:
        log.warning("states of the sweep's tasks are not known: %s", error)
        return sweep_tasks(out, ask=False)


def _task_job(task: TaskStatus) -> Job:
    state = {"done": "COMPLETED", "running": "RUNNING", "waiting": "PENDING"}.get(task.state, "FAILED")
    return Job(id=task.job, mark="", owner="", after=(), log=task.log, submitted=0.0, seen=JobState(state))
