"""The last SLURM job of each step of a pipeline.

OUT/jobs.json   written by `lavic submit` alone, which locks the folder
OUT/.seen.json  the last known state of each job, because SLURM forgets jobs, and the results that it read; written
                by every `lavic submit status`, without a lock
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from lavic.errors import ConfigError, DataError
from lavic.launch.slurm.client import JobState
from lavic.storage.atomic import atomic_write
from lavic.storage.file_lock import FileLock

FILE = "jobs.json"
SEEN = ".seen.json"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job, or an array of jobs, that was submitted."""

    id: str
    """Empty while it is not known whether sbatch has queued it."""
    mark: str
    """A unique text in the job's comment."""
    owner: str
    """The user who submitted it."""


@dataclass(frozen=True, kw_only=True)
class Job(Submission):
    """The last job of a step."""

    after: tuple[str, ...]
    """Steps whose jobs it depends on."""
    log: str
    """Its log file."""
    submitted: float
    """Seconds since the epoch."""
    seen: JobState = field(default_factory=lambda: JobState("PENDING"))
    """Its last known state."""


def read_jobs(out: Path) -> dict[str, Job]:
    """A pipeline's jobs by step; none before its first submission.

    Raises:
        DataError: The file is broken.
    """

    def parse(body: Any) -> dict[str, Job]:
        return {
            name: Job(**{**job, "after": tuple(job["after"]), "seen": JobState(**job["seen"])})
            for name, job in body["steps"].items()
        }

    jobs, states = read_json_file(out / FILE, parse) or {}, _read_states(out)
    return {name: replace(job, seen=states.get(job.id, job.seen)) for name, job in jobs.items()}


def read_json_file(
    path: Path, parse: Callable[[Any], T], hint: str = "remove it once none of its jobs is left in the queue"
) -> T | None:
    """A JSON file of a pipeline, converted by `parse`; None if it does not exist.

    Raises:
        DataError: The file is broken; `hint` says what to do.
    """
    if not path.is_file():
        return None
    try:
        return parse(json.loads(path.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: broken ({error}); {hint}") from None


def write_jobs(out: Path, jobs: Mapping[str, Job]) -> None:
    """Writes a pipeline's jobs."""
    body = {"steps": {name: asdict(job) for name, job in jobs.items()}}
    atomic_write(out / FILE, json.dumps(body, indent=1) + "\n")


def write_states(out: Path, jobs: Mapping[str, Job], used: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Writes the last known state of jobs, if this user may write here.

    `used` are digests of the results that a job read, by its id; by default those in the file.
    """
    used = read_used(out) if used is None else used
    states = {job.id: asdict(job.seen) for job in jobs.values() if job.id}
    text = json.dumps({"states": states, "used": used}, indent=1) + "\n"
    with contextlib.suppress(OSError):
        if not (out / SEEN).is_file() or (out / SEEN).read_bytes() != text.encode():
            atomic_write(out / SEEN, text)


def read_used(out: Path) -> dict[str, dict[str, str]]:
    """Digests of the results that jobs read, by job id."""
    return {id: dict(results) for id, results in _read_section(out, "used").items()}


def _read_states(out: Path) -> dict[str, JobState]:
    try:
        return {id: JobState(**state) for id, state in _read_section(out, "states").items()}
    except TypeError:
        return {}


def _read_section(out: Path, key: str) -> dict[str, dict[str, Any]]:
    try:
        return dict(json.loads((out / SEEN).read_text("utf-8"))[key])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Locks a pipeline's folder against a second `lavic submit`.

    Raises:
        ConfigError: Another one holds the lock.
    """
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".submit.lock") as lock:
        if not lock.acquire():
            raise ConfigError(f"{out}: another `lavic submit` is running here; wait until it has ended")
        yield
