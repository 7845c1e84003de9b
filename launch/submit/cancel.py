"""`lavic submit cancel`: cancels the jobs of a pipeline, or of some of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from lavic.config import Positional, parse, settings
from lavic.launch.pipeline.dag import Layout
from lavic.launch.pipeline.job_registry import locked, read_jobs, write_jobs, write_states
from lavic.launch.pipeline.step_status import refresh_jobs
from lavic.launch.slurm import client
from lavic.launch.submit.status import flag_trailing_args, read_pipeline, select_names, select_tasks, sweep_tasks

DESCRIPTION = """Cancels the jobs of a pipeline, or those of the named steps or stages; SLURM also cancels the jobs that
depend on them. Results that are done are kept; `lavic submit` with the same settings continues from there. Of a sweep a
name is a cell, a stage, or both.

  lavic submit cancel /shared/amazon
  lavic submit cancel /shared/lavic tune-all_beauty-st-0
  lavic submit cancel /shared/amazon tune evaluate"""


@settings
class Settings:
    """Which jobs."""

    out: Annotated[Path, Positional]
    """The pipeline's folder."""
    steps: tuple[str, ...] = ()
    """Steps or stages, or cells of a sweep, also without the flag after OUT; by default all."""


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    chosen = parse(Settings, flag_trailing_args(argv, "--steps"), command="submit cancel", description=DESCRIPTION)
    _, steps = read_pipeline(chosen.out)
    out = Layout(chosen.out).out
    with locked(out):
        tasks = sweep_tasks(out, ask=False)
        step_names = [name for name in chosen.steps if not select_tasks(tasks, [name])]
        names = select_names(steps, step_names) if step_names else []
        jobs = refresh_jobs(read_jobs(out))
        if not chosen.steps:
            names = list(jobs)  # with the status job, which is no step
        active = {name: jobs[name] for name in names if name in jobs and jobs[name].seen.active}
        if active:
            client.cancel([job.id for job in active.values()])
        jobs = refresh_jobs(jobs)
        write_states(out, jobs)
        write_jobs(out, jobs)
        chosen_tasks = select_tasks(sweep_tasks(out), chosen.steps)
        waiting = [task for task in chosen_tasks if task.state in ("running", "waiting")]
        if waiting:
            client.cancel([task.job for task in waiting])
            print(f"{len(waiting)} tasks of the sweep: cancelled")
    for name, job in active.items():
        print(f"{name:<16}job {job.id}: cancelled")
    if not active and not waiting:
        print(f"{out}: no job to cancel")
    return 0
