"""`lavic submit cancel`: ends the jobs of a pipeline, or of some of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from lavic.config import Positional, parse, settings
from lavic.launch.pipeline.dag import Layout
from lavic.launch.pipeline.job_registry import held, note_seen, read_jobs, write_jobs
from lavic.launch.pipeline.step_status import refreshed
from lavic.launch.slurm import client
from lavic.launch.submit.status import behind_out, pick, read

DESCRIPTION = """Ends the jobs of a pipeline, or those of the steps or stages that are named; SLURM cancels the jobs
that wait for them. What is done stays; `lavic submit` with the same settings goes on from there.

  lavic submit cancel /shared/amazon
  lavic submit cancel /shared/amazon tune evaluate"""


@settings
class Settings:
    """Which jobs."""

    out: Annotated[Path, Positional]
    """The pipeline's folder."""
    steps: tuple[str, ...] = ()
    """Steps or stages, which may also follow OUT without the flag; by default all."""


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    chosen = parse(Settings, behind_out(argv, "--steps"), command="submit cancel", description=DESCRIPTION)
    _, steps = read(chosen.out)
    names = pick(steps, chosen.steps)
    at = Layout(chosen.out)
    with held(at.out):
        jobs = refreshed(read_jobs(at.out))
        if not chosen.steps:
            names = list(jobs)  # also the one behind all others
        active = {name: jobs[name] for name in names if name in jobs and jobs[name].seen.active}
        if active:
            client.cancel([job.id for job in active.values()])
        jobs = refreshed(jobs)
        note_seen(at.out, jobs)
        write_jobs(at.out, jobs)
    for name, job in active.items():
        print(f"{name:<16}job {job.id}: cancelled")
    if not active:
        print(f"{at.out}: no job to cancel")
    return 0
