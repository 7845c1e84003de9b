"""Which job does which step of a pipeline.

OUT/jobs.json   the last job of each step; written by `lavic submit` alone, which holds the folder
OUT/.seen.json  what SLURM last said of them, since it forgets, and what they had read; written by whoever looks,
                without a lock
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
    """What its comment holds, and no other job's."""
    owner: str
    """The user who submitted it."""
    after: tuple[str, ...]
    """Steps whose jobs it waits for, or waited for."""
    log: str
    """What it says."""
    submitted: float
    """Seconds since the epoch."""
    seen: JobState = field(default_factory=lambda: JobState("PENDING"))
    """What SLURM last said of it."""


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
    seen = _read_seen(out)
    return {name: replace(job, seen=seen.get(job.id, job.seen)) for name, job in jobs.items()}


def write_jobs(out: Path, jobs: Mapping[str, Job]) -> None:
    """Keeps a pipeline's jobs."""
    body = {"steps": {name: asdict(job) for name, job in jobs.items()}}
    atomic_write(out / FILE, json.dumps(body, indent=1) + "\n")


def note_seen(out: Path, jobs: Mapping[str, Job], used: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Notes how jobs are and what they had read. Does nothing where this user may not write.

    Args:
        out: The pipeline's folder.
        jobs: As seen now.
        used: Digests of the results that a job had read, by its id; by default as noted before.
    """
    used = read_used(out) if used is None else used
    states = {job.id: asdict(job.seen) for job in jobs.values() if job.id}
    text = json.dumps({"states": states, "used": used}, indent=1) + "\n"
    with contextlib.suppress(OSError):
        if not (out / SEEN).is_file() or (out / SEEN).read_bytes() != text.encode():
            atomic_write(out / SEEN, text)


def read_used(out: Path) -> dict[str, dict[str, str]]:
    """Digests of the results that jobs had read, by their ids."""
    return {id: dict(results) for id, results in _seen(out, "used").items()}


def _read_seen(out: Path) -> dict[str, JobState]:
    try:
        return {id: JobState(**state) for id, state in _seen(out, "states").items()}
    except TypeError:
        return {}


def _seen(out: Path, key: str) -> dict[str, dict[str, Any]]:
    try:
        return dict(json.loads((out / SEEN).read_text("utf-8"))[key])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Holds a pipeline's folder against a second `lavic submit`.

    Raises:
        ConfigError: Another one holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".submit.lock") as lock:
        if not lock.acquire():
            raise ConfigError(f"{out}: another `lavic submit` is at work here; wait for it")
        yield
