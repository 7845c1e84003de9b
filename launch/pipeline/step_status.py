"""The status of each step of a pipeline: its result, what SLURM reports of its job, and why the job ended."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lavic.launch.pipeline.dag import Step
from lavic.launch.pipeline.job_registry import Job
from lavic.launch.pipeline.step_digest import reads_result_of
from lavic.launch.slurm.client import NEVER, JobState, job_ids_by_mark, job_states
from lavic.launch.slurm.log_file import read_tail

State = Literal["done", "stale", "running", "waiting", "failed", "cancelled", "open"]
"""`open`: not submitted yet. `stale`: done, with other settings or inputs than are wanted now."""

_START = re.compile(r"\bjob \d+, start \d+, on ")
"""The first line of each start of a job in its log, which holds all starts."""
_CAUSES = (
    re.compile(r"(lavic( [a-z-]+)?: )?rank \d+( on \S+)? was killed by .+"),
    re.compile(r"lavic( [a-z-]+)*: error: .+|preflight: \d+ of \d+ nodes? failed.*"),
    re.compile(r"(lavic( [a-z-]+)?: )?rank \d+( on \S+)? exited with .+"),
    re.compile(r".*(\berror\b|\bError\b|Exception|CANCELLED|TIME LIMIT|Killed|\boom\b).*", re.I),
    re.compile(r".*\S.*"),
)
"""Lines that tell why a job ended, the most reliable first. A killed rank makes the ranks that wait for it fail;
a command's error explains the exit code that its launcher reports."""
_UPDATING = ("crawl", "describe")
"""Stages that may leave an existing result as it is."""
_EXIT = re.compile(r"(failed with exit code|exit code) (\d+)\b.*submit the same line again")


@dataclass(frozen=True)
class StepStatus:
    """The status of one step."""

    step: Step
    state: State
    job: Job | None = None
    why: str = ""
    """What it waits for, or why it failed."""

    @property
    def satisfied(self) -> bool:
        """Whether steps that need it can be submitted: it is done, or has a job."""
        return self.state in ("done", "stale", "running", "waiting")


def refresh_jobs(jobs: dict[str, Job]) -> dict[str, Job]:
    """The jobs with their states now; one whose state is not known now keeps its last one.

    A job whose id is not known since sbatch gave no answer is looked up in the queue, and left out if it is not there.

    Raises:
        LaunchError: SLURM does not answer.
    """
    ids = job_ids_by_mark(job.mark for job in jobs.values() if not job.id)
    known: dict[str, Job] = {}
    for name, job in jobs.items():
        if job.id:
            known[name] = job
        elif id := ids.get(job.mark):
            known[name] = replace(job, id=id, log=str(Path(job.log).with_name(f"{name}-{id}.log")))
    active = [job for job in known.values() if job.seen.active]
    states: dict[str, JobState] = {}
    for owner in dict.fromkeys(job.owner for job in active):
        states |= job_states([job.id for job in active if job.owner == owner], owner)
    return {name: replace(job, seen=states.get(job.id, job.seen)) for name, job in known.items()}


def step_statuses(
    steps: Sequence[Step],
    jobs: Mapping[str, Job],
    complete: Collection[str],
    differences: Mapping[str, Sequence[str]],
) -> dict[str, StepStatus]:
    """The status of each step, by name.

    `complete`: the steps with a complete result. `differences`: by step, how its complete or partial result differs
    from what is wanted now.
    """
    statuses: dict[str, StepStatus] = {}
    for step in steps:
        job = jobs.get(step.name)
        status = _step_status(step, job, step.name in complete, statuses)
        if status.state == "done" and (why := differences.get(step.name) or _changing_inputs(step, job, statuses)):
            status = replace(status, state="stale", why="; ".join(why))
        statuses[step.name] = status
    return statuses


def _changing_inputs(step: Step, job: Job | None, earlier: Mapping[str, StepStatus]) -> list[str]:
    """The steps whose results this one reads and that are stale or running again.

    A crawl that retries photos may gain none, and descriptions of the same photos are kept: whether these steps change
    their results is known when they have ended.
    """
    lines = []
    for name, other in earlier.items():
        if not reads_result_of(step, name):
            continue
        is_newer = other.job is not None and job is not None and other.job.submitted > job.submitted
        if other.state == "stale":
            lines.append(f"{name} is stale")
        elif is_newer and other.state in ("running", "waiting") and other.step.stage not in _UPDATING:
            lines.append(f"{name} is being run again")
    return lines


def _step_status(step: Step, job: Job | None, complete: bool, earlier: Mapping[str, StepStatus]) -> StepStatus:
    if job is None:
        return StepStatus(step, "done" if complete else "open")
    seen = job.seen
    # a running job no longer depends on others
    blocker = None if seen.active and seen.state != "PENDING" else _blocker(job, earlier)
    if seen.active and not blocker and not (seen.state == "COMPLETING" and complete):
        state: State = "waiting" if seen.state == "PENDING" else "running"
        return StepStatus(step, state, job, seen.reason if state == "waiting" else "")
    if complete:
        return StepStatus(step, "done", job)
    if blocker and (seen.active or seen.state in ("CANCELLED", "GONE") or seen.reason == NEVER):
        return StepStatus(step, "cancelled", job, f"{blocker.step.name} {blocker.state}: {blocker.why}")
    return _ended(step, job, seen)


def _ended(step: Step, job: Job, seen: JobState) -> StepStatus:
    """The status of a step whose job ended without its result."""
    cause = last_error(Path(job.log))
    if seen.state == "COMPLETED":
        return StepStatus(step, "failed", job, cause or "it ended without its result")
    if seen.state == "CANCELLED":
        return StepStatus(step, "cancelled", job, cause or "scancel")
    state = {"GONE": seen.reason, "FAILED": ""}.get(seen.state, seen.state)
    why = "; ".join(part for part in (state, cause) if part)
    return StepStatus(step, "failed", job, why or "FAILED; its log is empty")


def _blocker(job: Job | None, earlier: Mapping[str, StepStatus]) -> StepStatus | None:
    """The failed step because of which a job never starts."""
    for name in job.after if job else ():
        status = earlier.get(name)
        if status is None:
            continue
        if status.state == "failed":
            return status
        if status.state == "cancelled":
            return _blocker(status.job, earlier) or status
    return None


def last_error(log: Path) -> str:
    """The line of a log that best tells why the job's last start ended; "" where there is none."""
    lines = last_lines(log)
    for cause in _CAUSES:
        if matches := [match[0] for line in lines if (match := cause.search(line))]:
            return matches[-1][:400]
    return ""


def exit_code(job: Job) -> int | None:
    """The exit code of a job that has ended, by SLURM or by its log; None where neither has it."""
    if job.seen.active:
        return None
    if job.seen.exit_code is not None:
        return job.seen.exit_code
    matches = [match for line in last_lines(Path(job.log)) if (match := _EXIT.search(line))]
    return int(matches[-1][2]) if matches else None


def last_lines(log: Path, count: int | None = None) -> list[str]:
    """The last lines of a log, of the job's last start only and without blank ones; none where there is no log."""
    lines = [line.decode(errors="replace").strip() for line in read_tail(log)]
    first = max((number for number, line in enumerate(lines) if _START.search(line)), default=0)
    lines = [line for line in lines[first:] if line]
    return lines if count is None else lines[-count:]
