"""How each step of a pipeline stands: what is in its folder, what SLURM says of its job, why it came to that."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lavic.launch.pipeline.dag import Step
from lavic.launch.pipeline.job_registry import Job
from lavic.launch.pipeline.step_digest import uses
from lavic.launch.slurm.client import NEVER, JobState, marked, states

State = Literal["done", "stale", "running", "waiting", "failed", "cancelled", "open"]
"""`open`: not submitted yet. `stale`: done, with other settings or inputs than are wanted now."""

_TAIL = 1 << 16
_START = re.compile(r"\bjob \d+, start \d+, on ")
"""With this a batch script begins each start of a job; the log holds all of them."""
_REASONS = (
    re.compile(r"(lavic( [a-z]+)?: )?rank \d+( on \S+)? was ended by .+"),
    re.compile(r"lavic( [a-z]+)*: error: .+|preflight: \d+ of \d+ nodes will not do.*"),
    re.compile(r"(lavic( [a-z]+)?: )?rank \d+( on \S+)? left with .+"),
    re.compile(r".*(\berror\b|\bError\b|Exception|CANCELLED|TIME LIMIT|Killed|\boom\b).*", re.I),
    re.compile(r".*\S.*"),
)
"""What says why a job ended, the best reason first. A rank that a signal ended makes others fail that wait for it, and
what a command says of its end explains the exit code that its launcher sees."""
_CHANGED = ("crawl", "describe")
"""Stages that change the result that is there."""
_EXIT = re.compile(r"(failed with exit code|exit code) (\d+)\b.*submit the same line again")


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
        """Whether another step can go on from it: done, or under way."""
        return self.state in ("done", "stale", "running", "waiting")


def refreshed(jobs: dict[str, Job]) -> dict[str, Job]:
    """The jobs with what SLURM says of them now; one that cannot be asked about now stays as it was last seen.

    A job of which sbatch never said that it was queued is looked for in the queue; one that is not there is left out.

    Raises:
        LaunchError: SLURM does not answer.
    """
    found = marked(job.mark for job in jobs.values() if not job.id)
    known: dict[str, Job] = {}
    for name, job in jobs.items():
        if job.id:
            known[name] = job
        elif id := found.get(job.mark):
            known[name] = replace(job, id=id, log=str(Path(job.log).with_name(f"{name}-{id}.log")))
    asked = [job for job in known.values() if job.seen.active]
    now: dict[str, JobState] = {}
    for owner in dict.fromkeys(job.owner for job in asked):
        now |= states([job.id for job in asked if job.owner == owner], owner)
    return {name: replace(job, seen=now.get(job.id, job.seen)) for name, job in known.items()}


def situations(
    steps: Sequence[Step], jobs: Mapping[str, Job], whole: Collection[str], differ: Mapping[str, Sequence[str]]
) -> dict[str, Situation]:
    """How each step stands, by name.

    Args:
        steps: Each after those it needs.
        jobs: As last seen.
        whole: Names of the steps whose results stand.
        differ: For each step in what its result, or what there is of it, is not what is wanted now.
    """
    found: dict[str, Situation] = {}
    for step in steps:
        job = jobs.get(step.name)
        now = _situation(step, job, step.name in whole, found)
        if now.state == "done" and (why := differ.get(step.name) or _remade(step, job, found)):
            now = replace(now, state="stale", why="; ".join(why))
        found[step.name] = now
    return found


def _remade(step: Step, job: Job | None, before: Mapping[str, Situation]) -> list[str]:
    """The steps whose results this one reads and that are made again, or are to be.

    A crawl that tries photos again may gain none, and descriptions of the same photos are kept: whether those give
    another result is seen when it is there.
    """
    found = []
    for name, other in before.items():
        later = other.job is not None and job is not None and other.job.submitted > job.submitted
        if uses(step, name) and other.state == "stale":
            found.append(f"{name} is stale")
        elif uses(step, name) and later and other.state in ("running", "waiting") and other.step.stage not in _CHANGED:
            found.append(f"{name} is being made again")
    return found


def _situation(step: Step, job: Job | None, whole: bool, before: Mapping[str, Situation]) -> Situation:
    if job is None:
        return Situation(step, "done" if whole else "open")
    now = job.seen
    # one that runs already does not wait for what it came after
    blocker = None if now.active and now.state != "PENDING" else _blocker(job, before)
    if now.active and not blocker and not (now.state == "COMPLETING" and whole):
        state: State = "waiting" if now.state == "PENDING" else "running"
        return Situation(step, state, job, now.reason if state == "waiting" else "")
    if whole:
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


def _blocker(job: Job | None, before: Mapping[str, Situation]) -> Situation | None:
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
    """The line of a log that says best why the last start ended: a rank's death, else lavic's own last error, ..."""
    lines = last_lines(log)
    for reason in _REASONS:
        if found := [match[0] for line in lines if (match := reason.search(line))]:
            return found[-1][:400]
    return ""


def exit_code(job: Job) -> int | None:
    """The exit code of a job that has ended, as SLURM says it or its batch script did; None where nobody does."""
    if job.seen.active:
        return None
    if job.seen.exit_code is not None:
        return job.seen.exit_code
    found = [match for line in last_lines(Path(job.log)) if (match := _EXIT.search(line))]
    return int(found[-1][2]) if found else None


def last_lines(log: Path, count: int | None = None) -> list[str]:
    """The last lines that the last start of a job wrote to its log, without blank ones; none where there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return []
    first = max((number for number, line in enumerate(lines) if _START.search(line)), default=0)
    lines = [line for line in lines[first:] if line]
    return lines if count is None else lines[-count:]
