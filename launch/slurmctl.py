"""SLURM as a caller sees it: submit a job, ask what became of jobs. Words are lists; nothing goes through a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lavic.errors import LaunchError

ACTIVE = frozenset(
    (
        *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"),
        *("SUSPENDED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"),
    )
)
"""States of a job that may still do something."""

NEVER = "DependencyNeverSatisfied"
"""SLURM's reason for a job whose predecessor failed."""

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job."""

    state: str
    """Such as PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT."""
    reason: str = ""
    """Why it waits, or ended so: Dependency, NonZeroExitCode, ..."""

    @property
    def active(self) -> bool:
        """Whether it may still do something."""
        return self.state in ACTIVE and self.reason != NEVER


def submit(words: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Queues a job.

    Args:
        words: Of sbatch, without its name: options, script, arguments.
        env: Variables over this process's own.

    Returns:
        The job's id.

    Raises:
        LaunchError: There is no sbatch here, or it refused; with its own words.
    """
    done = _run(["sbatch", "--parsable", *words], env)
    if done.returncode:
        raise LaunchError(f"sbatch refused: {_said(done)}")
    # "123", or "123;cluster" where there are several clusters
    return done.stdout.strip().partition(";")[0]


def test(words: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Asks whether `submit` would be taken.

    Returns:
        "" or why the job could not start now, as when nodes are down: it would wait.

    Raises:
        LaunchError: There is no sbatch here, or it would refuse: no such partition, account or GPU.
    """
    done = _run(["sbatch", "--test-only", *words], env)
    if not done.returncode:
        return ""
    said = _said(done)
    if "sbatch: error" in done.stderr or "Invalid" in said:
        raise LaunchError(f"sbatch would refuse: {said}")
    return said


def states(jobs: Iterable[str]) -> dict[str, JobState]:
    """What became of jobs, by id. One that SLURM has forgotten (without accounting, minutes after its end) is left out.

    Raises:
        LaunchError: There is no SLURM here, or it does not answer.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    # Asked for all of ours: asked for one that is forgotten, squeue fails and tells nothing of the others.
    done = _run(["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%r"])
    if done.returncode:
        raise LaunchError(f"squeue does not answer: {_said(done)}")
    found: dict[str, JobState] = {}
    for line in done.stdout.splitlines():
        job, state, reason = [*line.split("|", 2), "", ""][:3]
        if job in wanted:
            found[job] = JobState(state, "" if reason == "None" else reason)
    return {**_accounted(wanted - found.keys()), **found}


def _accounted(jobs: set[str]) -> dict[str, JobState]:
    """What the accounting remembers of jobs that left the queue; nothing where there is no accounting."""
    if not jobs or shutil.which("sacct") is None:
        return {}
    form = "--format=JobIDRaw,State,Reason"
    done = _run(["sacct", "--noheader", "--parsable2", "--allocations", form, f"--jobs={','.join(sorted(jobs))}"])
    found = {}
    for line in done.stdout.splitlines() if not done.returncode else ():
        job, state, reason = [*line.split("|", 2), "", ""][:3]
        if job in jobs and state:
            # "CANCELLED by 1000"
            found[job] = JobState(state.split()[0], "" if reason == "None" else reason)
    return found


def _run(words: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which(words[0]) is None:
        raise LaunchError(f"no {words[0]} here: use a login node of the cluster; --dry-run works anywhere")
    try:
        return subprocess.run(
            words,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{words[0]} did not answer within {_PATIENCE_S:g} s") from None


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """What a program complained of, in one line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return "; ".join(lines[:3]) or f"exit code {done.returncode}"
