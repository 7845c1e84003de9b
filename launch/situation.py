"""How each step of a pipeline stands: what is in its folder, what SLURM says of its job, why it came to that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lavic.launch.jobs import Job
from lavic.launch.slurmctl import NEVER, JobState, states
from lavic.launch.steps import Step
from lavic.launch.whole import is_whole

State = Literal["done", "running", "waiting", "failed", "cancelled", "open"]
"""`open`: not submitted yet."""

GONE = JobState("GONE", "SLURM has forgotten the job")
"""Of a job that had not ended when it was last seen."""

_TAIL = 1 << 16
_OURS = re.compile(
    r"lavic [a-z]+: error: .+|preflight: \d+ of \d+ nodes will not do.*|rank \d+ on \S+ (was ended by|ended with) .+"
)
"""What a command, the look at the nodes and the ranks' launcher say of their end."""
_OTHERS = re.compile(r"\berror\b|\bError\b|Exception|CANCELLED|TIME LIMIT|Killed|oom", re.I)


@dataclass(frozen=True)
class Situation:
    """One step, now."""

    step: Step
    state: State
    job: Job | None = None
    why: str = ""
    """What it waits for, or what stopped it."""

    @property
    def settled(self) -> bool:
        """Whether there is nothing to submit: done, or under way."""
        return self.state in ("done", "running", "waiting")


def refreshed(jobs: dict[str, Job]) -> dict[str, Job]:
    """The jobs with what SLURM says of them now.

    Raises:
        LaunchError: SLURM does not answer.
    """
    asked = {name: job for name, job in jobs.items() if job.last_seen.active}
    now = states(job.id for job in asked.values())
    return {name: job.seen(now.get(job.id, GONE)) if name in asked else job for name, job in jobs.items()}


def situations(steps: Sequence[Step], jobs: dict[str, Job]) -> dict[str, Situation]:
    """How each step stands, by name.

    Args:
        steps: Each after those it needs.
        jobs: As last seen.
    """
    found: dict[str, Situation] = {}
    for step in steps:
        found[step.name] = _situation(step, jobs.get(step.name), found)
    return found


def _situation(step: Step, job: Job | None, before: dict[str, Situation]) -> Situation:
    if job is None:
        return Situation(step, "done" if is_whole(step) else "open")
    now, blocker = job.last_seen, _blocker(job, before)
    if now.active and not blocker and not (now.state == "COMPLETING" and is_whole(step)):
        state: State = "waiting" if now.state == "PENDING" else "running"
        return Situation(step, state, job, now.reason if state == "waiting" else "")
    if is_whole(step):
        return Situation(step, "done", job)
    if blocker and (now.active or now.state in ("CANCELLED", "GONE") or now.reason == NEVER):
        return Situation(step, "cancelled", job, f"{blocker.step.name} {blocker.state}: {blocker.why}")
    return _ended(step, job, now)


def _ended(step: Step, job: Job, now: JobState) -> Situation:
    """Of a job that ended without what it was for."""
    said = last_error(Path(job.log))
    if now.state == "COMPLETED":
        return Situation(step, "failed", job, said or "it ended without its result")
    if now.state == "CANCELLED":
        return Situation(step, "cancelled", job, said or "scancel")
    how = {"GONE": now.reason, "FAILED": ""}.get(now.state, now.state)
    return Situation(step, "failed", job, "; ".join(part for part in (how, said) if part) or "FAILED; its log is empty")


def _blocker(job: Job | None, before: dict[str, Situation]) -> Situation | None:
    """The failed step because of which a job never starts."""
    for name in job.after if job else ():
        earlier = before.get(name)
        if earlier is None:
            continue
        if earlier.state == "failed":
            return earlier
        if earlier.state == "cancelled":
            return _blocker(earlier.job, before) or earlier
    return None


def last_error(log: Path) -> str:
    """The line of a log that says best why it ended: lavic's own last error, else the last that looks like one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    ours = [found[0] for line in lines if (found := _OURS.search(line))]
    others = [line for line in lines if _OTHERS.search(line)]
    return next((some[-1] for some in (ours, others, [line for line in lines if line]) if some), "")[:400]
