"""A client of SLURM's commands: submits and cancels jobs, queries their states. No argument goes through a shell."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lavic.errors import LaunchError, first_line

ACTIVE = frozenset(
    (
        *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"),
        *("SUSPENDED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"),
    )
)
"""States of a job that has not ended."""

NEVER = "DependencyNeverSatisfied"
"""SLURM's reason for a job whose dependency failed."""

_TIMEOUT_S = 60.0
_CLIENT_VARIABLES = ("SLURM_CLUSTERS", "SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_TIME_FORMAT")
"""Variables by which SLURM's commands find their cluster; all others beginning with SLURM_ describe a job."""
_LOOKUPS, _PAUSE_S = 3, 5.0
"""How often the queue is searched for a job after sbatch gave no answer, and the pause between searches."""
_NO_ANSWER = re.compile(
    r"timed? ?out|unable to contact|zero bytes were|communication connection|connection refused", re.I
)
"""Errors of SLURM's commands after which it is not known whether the controller carried out the request."""


class NoAnswer(LaunchError):
    """SLURM did not answer: it is not known whether it carried out the request."""


@dataclass(frozen=True)
class JobState:
    """What SLURM reports of a job."""

    state: str
    """Such as PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT."""
    reason: str = ""
    """Why it waits, or why it ended: Dependency, NonZeroExitCode, ..."""
    elapsed: str = ""
    """Its run time, as 1-02:03:04."""
    limit: str = ""
    """Its time limit."""
    start: str = ""
    """When it started, or when SLURM expects it to; empty where that is not known."""
    exit_code: int | None = None
    """Exit code of a job that has ended, where SLURM still has it: 128 + n where signal n killed it."""

    @property
    def active(self) -> bool:
        """Whether it runs or may still run."""
        return self.state in ACTIVE and self.reason != NEVER


GONE = JobState("GONE", "SLURM has forgotten the job")
"""State of a job that was active when it was last seen, and that SLURM no longer knows."""


def current_user() -> str:
    """The name of this process's user."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def submit(args: Sequence[str], env: Mapping[str, str] | None = None, *, mark: str) -> str:
    """Submits a job, exactly once; returns its id.

    The job's comment contains `mark`, a unique text: if sbatch gives no answer, the queue is searched for it.

    Raises:
        NoAnswer: sbatch gave none, and the job is not in the queue, or not yet.
        LaunchError: There is no sbatch here, or it refused.
    """
    try:
        completed = _run(["sbatch", "--parsable", *args], env)
        if completed.returncode and _NO_ANSWER.search(completed.stderr):
            raise NoAnswer(f"sbatch: {_error_summary(completed)}")
    except NoAnswer as error:
        for attempt in range(_LOOKUPS):
            time.sleep(_PAUSE_S if attempt else 0)
            if id := job_ids_by_mark([mark]).get(mark):
                return id
        raise NoAnswer(f"{error}; the queue has no job with the comment {mark!r}, at least not yet") from None
    if completed.returncode:
        raise LaunchError(f"sbatch refused: {_error_summary(completed)}")
    # "123", or "123;cluster" where there are several clusters; a site's own sbatch may print a greeting before it
    ids = re.findall(r"^(\d+)(?:;\S+)?$", completed.stdout, re.M)
    if not ids and (id := job_ids_by_mark([mark]).get(mark)):
        ids.append(id)
    if not ids:
        raise NoAnswer(f"sbatch printed no job id: {first_line(RuntimeError(completed.stdout))}")
    return str(ids[-1])


def test_submit(args: Sequence[str]) -> str:
    """Checks whether sbatch would accept a job; returns why it could not start now, as when nodes are down, or "".

    Raises:
        LaunchError: There is no sbatch here, or it would refuse: no such partition, account or GPU.
    """
    completed = _run(["sbatch", "--test-only", *args])
    if not completed.returncode:
        return ""
    summary = _error_summary(completed)
    if "sbatch: error" in completed.stderr or "Invalid" in summary:
        raise LaunchError(f"sbatch would refuse: {summary}")
    return summary


def job_ids_by_mark(marks: Iterable[str]) -> dict[str, str]:
    """The ids of this user's jobs by the mark in their comments; without marks that no job has.

    Raises:
        LaunchError: SLURM does not answer.
    """
    distinct_marks = set(marks)
    if not distinct_marks:
        return {}
    rows = [line.split("|", 1) for line in _squeue(current_user(), "%i|%k")]
    since = time.strftime("%Y-%m-%d", time.localtime(time.time() - 7 * 86400))
    # comments are in the accounting where the site stores them (AccountingStoreFlags=job_comment)
    accounted, _ = _sacct(f"--starttime={since}", "--format=JobID,Comment%200")
    rows += [line.split("|", 1) for line in accounted]
    # of an array the id of the whole: its tasks are 123_4 or 123_[5-9%2]
    return {
        mark: row[0].partition("_")[0] for mark in distinct_marks for row in rows if len(row) == 2 and mark in row[1]
    }


def job_states(ids: Iterable[str], owner: str = "") -> dict[str, JobState]:
    """The states of a user's jobs, by id; `GONE` for one that SLURM has forgotten (without accounting, after minutes).

    A job whose state cannot be known now is left out: the accounting does not answer, or another user's jobs are hidden
    from this one.

    Raises:
        LaunchError: There is no SLURM here, or it does not answer.
    """
    requested = set(ids)
    if not requested:
        return {}
    owner = owner or current_user()
    queued = _queued_states(requested, owner)
    not_queued = requested - queued.keys()
    accounted, certain = _accounted_states(not_queued)
    for id, job in queued.items():
        if not job.active and job.state != "COMPLETED" and job.reason != NEVER:
            queued[id] = _with_exit_code(id, job)
    forgotten = dict.fromkeys(not_queued - accounted.keys(), GONE) if certain and owner == current_user() else {}
    return {**forgotten, **accounted, **queued}


def task_states(ids: Iterable[str], owner: str = "") -> dict[str, JobState]:
    """The states of tasks of a user's arrays, by id as `123_4`; without those that SLURM has forgotten.

    Raises:
        LaunchError: There is no SLURM here, or it does not answer.
    """
    return _queued_states(set(ids), owner or current_user(), "--array")


def _queued_states(ids: set[str], owner: str, *options: str) -> dict[str, JobState]:
    """The states of jobs in the queue, by id."""
    states: dict[str, JobState] = {}
    for line in _squeue(owner, "%i|%T|%M|%l|%S|%r", *options):
        id, state, elapsed, limit, start, reason = [*line.split("|", 5), *[""] * 5][:6]
        if id in ids:
            states[id] = JobState(state, _value(reason), _value(elapsed), _value(limit), _value(start))
    return states


def cancel(ids: Sequence[str]) -> None:
    """Cancels jobs, running or waiting.

    Raises:
        LaunchError: SLURM refuses or does not answer.
    """
    completed = _run(["scancel", *ids])
    if (
        completed.returncode
        and "Invalid job id" not in completed.stderr
        and "already completed" not in completed.stderr
    ):
        raise LaunchError(f"scancel: {_error_summary(completed)}")


def _squeue(owner: str, fields: str, *options: str) -> list[str]:
    """Lines on all jobs of a user: squeue fails without an answer when one of several given ids is forgotten."""
    completed = _run(["squeue", f"--user={owner}", "--noheader", "--states=all", f"--format={fields}", *options])
    if completed.returncode:
        raise LaunchError(f"squeue does not answer: {_error_summary(completed)}")
    return completed.stdout.splitlines()


def _accounted_states(ids: set[str]) -> tuple[dict[str, JobState], bool]:
    """The accounting's states of jobs that left the queue, and whether these are certain to be all it has."""
    if not ids:
        return {}, True
    fields = "--format=JobIDRaw,State,Elapsed,Timelimit,Start,ExitCode,Reason"
    lines, certain = _sacct("--allocations", fields, f"--jobs={','.join(sorted(ids))}")
    states = {}
    for line in lines:
        id, state, elapsed, limit, start, code, reason = [*line.split("|", 6), *[""] * 6][:7]
        if id in ids and state:
            # the state may be "CANCELLED by 1000"
            name, exit_code = state.split()[0], _parse_exit_code(code)
            states[id] = JobState(name, _value(reason), _value(elapsed), _value(limit), _value(start), exit_code)
    return states, certain


def _sacct(*args: str) -> tuple[list[str], bool]:
    """Lines of the accounting, and whether they are complete; a site without accounting has none to miss."""
    if shutil.which("sacct") is None:
        return [], True
    try:
        completed = _run(["sacct", "--noheader", "--parsable2", *args])
    except NoAnswer:
        return [], False
    if completed.returncode:
        return [], "disabled" in completed.stderr
    return completed.stdout.splitlines(), True


def _with_exit_code(id: str, job: JobState) -> JobState:
    """An ended job with its exit code, which squeue does not print."""
    try:
        completed = _run(["scontrol", "show", "job", "-o", id])
    except LaunchError:
        return job
    match = re.search(r"\bExitCode=(\d+:\d+)", completed.stdout)
    code = (_parse_exit_code(match[1]) or None) if match else None  # 0: it was not its command that failed
    return replace(job, exit_code=code)


def _parse_exit_code(text: str) -> int | None:
    code, _, number = text.partition(":")
    if not code.isdigit():
        return None
    return 128 + int(number) if number.isdigit() and int(number) else int(code)


def _value(text: str) -> str:
    """A field of SLURM's output; empty where it says that it has none."""
    return "" if text in ("None", "N/A", "Unknown", "INVALID", "NOT_SET") else text


def _run(args: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which(args[0]) is None:
        raise LaunchError(f"{args[0]} not found: run this on a login node of the cluster; --dry-run works anywhere")
    inherited = dict(os.environ)
    if args[0] == "sbatch":  # within a job: its memory, GPUs and binding are not those of the new one
        inherited = {k: v for k, v in inherited.items() if not k.startswith("SLURM_") or k in _CLIENT_VARIABLES}
    try:
        return subprocess.run(
            args,
            env={**inherited, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{args[0]} did not answer within {_TIMEOUT_S:g} s") from None


def _error_summary(completed: subprocess.CompletedProcess[str]) -> str:
    """A program's error output in one line."""
    lines = [line.strip() for line in completed.stderr.splitlines() if line.strip()]
    return "; ".join(lines[:3]) or f"exit code {completed.returncode}"
