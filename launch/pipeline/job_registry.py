"""The last SLURM job of each step of a pipeline.

OUT/jobs.json   written by `lavic submit` alone, which locks the folder
OUT/.seen.json  the last known state of each job, since SLURM forgets, and the results that it had read; written by
                every `lavic submit status`, without a lock
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lavic.errors import ConfigError, DataError
from lavic.launch.slurm.client import JobState
from lavic.storage.atomic import atomic_write
from lavic.storage.file_lock import FileLock

FILE = "jobs.json"
SEEN = ".seen.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """The last job of a step."""

    id: str
    """Empty while it is not known whether sbatch has queued it."""
    mark: str
    """A unique text in the job's comment."""
    owner: str
    """The user who submitted it."""
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
    path = out / FILE
    if not path.is_file():
        return {}
    try:
        body = json.loads(path.read_text("utf-8"))["steps"]
        jobs = {
            name: Job(**{**job, "after": tuple(job["after"]), "seen": JobState(**job["seen"])})
            for name, job in body.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: broken ({error}); remove it once none of its jobs is left in the queue") from None
    states = _read_states(out)
    return {name: replace(job, seen=states.get(job.id, job.seen)) for name, job in jobs.items()}


def write_jobs(out: Path, jobs: Mapping[str, Job]) -> None:
    """Writes a pipeline's jobs."""
    body = {"steps": {name: asdict(job) for name, job in jobs.items()}}
    atomic_write(out / FILE, json.dumps(body, indent=1) + "\n")


def write_states(out: Path, jobs: Mapping[str, Job], used: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Writes the last known state of jobs and what they had read. Does nothing where this user may not write.

    Args:
        out: The pipeline's folder.
        jobs: With their state now.
        used: Digests of the results that a job had read, by its id; by default those that were written before.
    """
    used = read_used(out) if used is None else used
    states = {job.id: asdict(job.seen) for job in jobs.values() if job.id}
    text = json.dumps({"states": states, "used": used}, indent=1) + "\n"
    with contextlib.suppress(OSError):
        if not (out / SEEN).is_file() or (out / SEEN).read_bytes() != text.encode():
            atomic_write(out / SEEN, text)


def read_used(out: Path) -> dict[str, dict[str, str]]:
    """Digests of the results that jobs had read, by job id."""
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
