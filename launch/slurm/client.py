"""SLURM as a caller sees it: submit a job, ask what became of jobs. Words are lists; nothing goes through a shell."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import time
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
_ASKS, _PAUSE_S = 3, 5.0
"""How often the queue is asked for a job of which sbatch did not say that it was queued, and the time between."""
_UNKNOWN = re.compile(
    r"timed? ?out|unable to contact|zero bytes were|communication connection|connection refused", re.I
)
"""What SLURM's programs say when they do not know whether the controller did what it was asked."""


class NoAnswer(LaunchError):
    """SLURM did not answer: whether it did what it was asked is not known."""


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job."""

    state: str
    """Such as PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT."""
    reason: str = ""
    """Why it waits, or ended so: Dependency, NonZeroExitCode, ..."""
    elapsed: str = ""
    """How long it has run, as 1-02:03:04."""
    limit: str = ""
    """How long it may run."""
    start: str = ""
    """When it started, or when SLURM expects it to; empty where that is not known."""
    exit_code: int | None = None
    """Of one that has ended, where SLURM still knows: 128 + n where signal n ended it."""

    @property
    def active(self) -> bool:
        """Whether it may still do something."""
        return self.state in ACTIVE and self.reason != NEVER


GONE = JobState("GONE", "SLURM has forgotten the job")
"""Of a job that had not ended when it was last seen."""


def user() -> str:
    """The name of this process's user, as SLURM knows it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def submit(words: Sequence[str], env: Mapping[str, str] | None = None, *, mark: str) -> str:
    """Queues a job, once.

    Args:
        words: Of sbatch, without its name: options, script, arguments. The job's comment holds `mark`.
        env: Variables over this process's own.
        mark: No other job's comment holds it: where sbatch gives no answer, the queue is asked for it.

    Returns:
        The job's id.

    Raises:
        NoAnswer: sbatch gave none, and the job is not in the queue, or not yet.
        LaunchError: There is no sbatch here, or it refused; with its own words.
    """
    try:
        done = _run(["sbatch", "--parsable", *words], env)
        if done.returncode and _UNKNOWN.search(done.stderr):
            raise NoAnswer(f"sbatch: {_said(done)}")
    except NoAnswer as error:
        for again in range(_ASKS):
            time.sleep(_PAUSE_S if again else 0)
            if job := marked([mark]).get(mark):
                return job
        raise NoAnswer(f"{error}; the queue has no job with the comment {mark!r}, at least not yet") from None
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


def marked(marks: Iterable[str]) -> dict[str, str]:
    """The ids of this user's jobs by the mark in their comments; without those that have none.

    Raises:
        LaunchError: SLURM does not answer.
    """
    wanted = set(marks)
    if not wanted:
        return {}
    rows = [line.split("|", 1) for line in _squeue(user(), "%i|%k")]
    since = time.strftime("%Y-%m-%d", time.localtime(time.time() - 7 * 86400))
    # keeps comments where the site has asked it to (AccountingStoreFlags=job_comment)
    accounted, _ = _sacct(f"--starttime={since}", "--format=JobIDRaw,Comment%200")
    rows += [line.split("|", 1) for line in accounted]
    return {mark: row[0] for mark in wanted for row in rows if len(row) == 2 and mark in row[1]}


def states(jobs: Iterable[str], owner: str = "") -> dict[str, JobState]:
    """What became of jobs, by id; `GONE` for one that SLURM has forgotten (without accounting, minutes after its end).

    A job of which nothing can be known now is left out: the accounting does not answer, or another user's jobs are not
    shown to this one.

    Args:
        jobs: Ids.
        owner: Name of the user who submitted them; by default this one.

    Raises:
        LaunchError: There is no SLURM here, or it does not answer.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    owner = owner or user()
    found: dict[str, JobState] = {}
    for line in _squeue(owner, "%i|%T|%M|%l|%S|%r"):
        job, state, elapsed, limit, start, reason = [*line.split("|", 5), *[""] * 5][:6]
        if job in wanted:
            found[job] = JobState(state, _known(reason), _known(elapsed), _known(limit), _known(start))
    left = wanted - found.keys()
    accounted, sure = _accounted(left)
    for job, now in found.items():
        if not now.active and now.state != "COMPLETED" and now.reason != NEVER:
            found[job] = _with_exit_code(job, now)
    forgotten = dict.fromkeys(left - accounted.keys(), GONE) if sure and owner == user() else {}
    return {**forgotten, **accounted, **found}


def cancel(jobs: Sequence[str]) -> None:
    """Ends jobs, those that wait too.

    Raises:
        LaunchError: SLURM refuses or does not answer.
    """
    done = _run(["scancel", *jobs])
    if done.returncode and "Invalid job id" not in done.stderr and "already completed" not in done.stderr:
        raise LaunchError(f"scancel: {_said(done)}")


def _squeue(owner: str, form: str) -> list[str]:
    """Lines on all jobs of a user: asked for one that is forgotten, squeue fails and tells nothing of the others."""
    done = _run(["squeue", f"--user={owner}", "--noheader", "--states=all", f"--format={form}"])
    if done.returncode:
        raise LaunchError(f"squeue does not answer: {_said(done)}")
    return done.stdout.splitlines()


def _accounted(jobs: set[str]) -> tuple[dict[str, JobState], bool]:
    """What the accounting remembers of jobs that left the queue, and whether it would have said so of all."""
    if not jobs:
        return {}, True
    form = "--format=JobIDRaw,State,Elapsed,Timelimit,Start,ExitCode,Reason"
    lines, sure = _sacct("--allocations", form, f"--jobs={','.join(sorted(jobs))}")
    found = {}
    for line in lines:
        job, state, elapsed, limit, start, code, reason = [*line.split("|", 6), *[""] * 6][:7]
        if job in jobs and state:
            # "CANCELLED by 1000"
            now = (state.split()[0], _known(reason), _known(elapsed), _known(limit), _known(start), _exit_code(code))
            found[job] = JobState(*now)
    return found, sure


def _sacct(*words: str) -> tuple[list[str], bool]:
    """Lines of the accounting, and whether they are all that there is to know: also where there is no accounting."""
    if shutil.which("sacct") is None:
        return [], True
    try:
        done = _run(["sacct", "--noheader", "--parsable2", *words])
    except NoAnswer:
        return [], False
    if done.returncode:
        return [], "disabled" in done.stderr
    return done.stdout.splitlines(), True


def _with_exit_code(job: str, now: JobState) -> JobState:
    """An ended job with its exit code, which squeue does not tell."""
    try:
        done = _run(["scontrol", "show", "job", "-o", job])
    except LaunchError:
        return now
    found = re.search(r"\bExitCode=(\d+:\d+)", done.stdout)
    code = (_exit_code(found[1]) or None) if found else None  # 0: it was not its command that failed
    return JobState(now.state, now.reason, now.elapsed, now.limit, now.start, code)


def _exit_code(text: str) -> int | None:
    code, _, number = text.partition(":")
    if not code.isdigit():
        return None
    return 128 + int(number) if number.isdigit() and int(number) else int(code)


def _known(text: str) -> str:
    return "" if text in ("None", "N/A", "Unknown", "INVALID", "NOT_SET") else text


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
            errors="replace",
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{words[0]} did not answer within {_PATIENCE_S:g} s") from None


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """What a program complained of, in one line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return "; ".join(lines[:3]) or f"exit code {done.returncode}"
