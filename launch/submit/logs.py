"""`lavic submit logs`: what the job of a step says, as far as it is, or as it goes on."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import PositiveInt

from lavic.config import Positional, parse, settings
from lavic.errors import ConfigError, LaunchError
from lavic.launch.pipeline.dag import Layout
from lavic.launch.pipeline.job_registry import Job, read_jobs
from lavic.launch.pipeline.step_status import refreshed
from lavic.launch.submit.status import POLL_S, behind_out, pick, read

DESCRIPTION = """Prints the end of the log of a step's last job: of the step that is named, else of the one that runs,
or that wrote last.

  lavic submit logs /shared/amazon
  lavic submit logs /shared/amazon distill -f"""

_PAUSE_S = 0.5


@settings
class Settings:
    """Which log, and how much of it."""

    out: Annotated[Path, Positional]
    """The pipeline's folder."""
    step: str | None = None
    """A step or stage, which may also follow OUT without the flag."""
    lines: PositiveInt = 40
    """Lines from its end."""
    follow: bool = False
    """Or -f: print what comes, until the job has ended."""


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    words = [word for word in argv if word != "-f"]
    words = [*behind_out(words, "--step"), *(["--follow"] if "-f" in argv else [])]
    chosen = parse(Settings, words, command="submit logs", description=DESCRIPTION)
    _, steps = read(chosen.out)
    names = pick(steps, (chosen.step,) if chosen.step else ())
    out = Layout(chosen.out).out
    job = _choose({name: job for name, job in _jobs(out).items() if name in names})
    if job is None:
        raise ConfigError(f"{chosen.step or out}: no job has been submitted")
    log = Path(job.log)
    print(f"== {log}", file=sys.stderr)
    if not log.is_file() and not chosen.follow:
        print(f"nothing yet: job {job.id} is {job.seen.state}", file=sys.stderr)
        return 0
    at = _tail(log, chosen.lines)
    if chosen.follow:
        _follow(log, at, lambda: _active(out, job.id))
    return 0


def _jobs(out: Path) -> dict[str, Job]:
    jobs = read_jobs(out)
    try:
        return refreshed(jobs)
    except LaunchError as error:
        print(f"as last seen, for now: {error}", file=sys.stderr)
        return {name: job for name, job in jobs.items() if job.id}


def _choose(jobs: dict[str, Job]) -> Job | None:
    """The job that runs, else the one that wrote last, else the first."""

    def written(job: Job) -> float:
        log = Path(job.log)
        return log.stat().st_mtime if log.is_file() else 0.0

    running = [job for job in jobs.values() if job.seen.active and job.seen.state != "PENDING"]
    every = running or list(jobs.values())
    return max(every, key=written) if every else None


def _tail(log: Path, count: int) -> int:
    """Prints the last lines; returns where the file ended."""
    if not log.is_file():
        return 0
    with log.open("rb") as file:
        for line in deque(file, count):
            sys.stdout.buffer.write(line)
        sys.stdout.flush()
        return file.tell()


def _follow(log: Path, at: int, active: Callable[[], bool]) -> None:
    """Prints what is added behind a place, until the job has ended."""
    asked = time.monotonic()
    ended = False
    while True:
        if log.is_file():
            with log.open("rb") as file:
                file.seek(at)
                sys.stdout.buffer.write(file.read())
                sys.stdout.flush()
                at = file.tell()
        if ended:
            return
        if time.monotonic() - asked >= POLL_S:
            ended, asked = not active(), time.monotonic()  # then once more, for its last words
        time.sleep(_PAUSE_S)


def _active(out: Path, id: str) -> bool:
    return any(job.id == id and job.seen.active for job in _jobs(out).values())
