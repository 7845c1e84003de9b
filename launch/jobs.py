"""OUT/jobs.json: which job does which step of a pipeline. Written by `lavic submit`, read by its status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lavic.data.atomic import write_whole
from lavic.errors import ConfigError, DataError
from lavic.launch.slurmctl import JobState
from lavic.lock import Lock

FILE = "jobs.json"


@dataclass(frozen=True)
class Job:
    """The last job of a step."""

    id: str
    after: tuple[str, ...]
    """Steps whose jobs it waits for, or waited for."""
    log: str
    """What it says."""
    submitted: float
    """Seconds since the epoch."""
    state: str = "PENDING"
    """What SLURM last said of it; kept, since SLURM forgets."""
    reason: str = ""

    @property
    def last_seen(self) -> JobState:
        """What SLURM last said of it."""
        return JobState(self.state, self.reason)

    def seen(self, now: JobState) -> Job:
        """With what SLURM says of it now."""
        return replace(self, state=now.state, reason=now.reason)


def read_jobs(out: Path) -> dict[str, Job]:
    """A pipeline's jobs by step; none before its first submission.

    Raises:
        DataError: The file is broken.
    """
    path = out / FILE
    if not path.is_file():
        return {}
    try:
        body = json.loads(path.read_text("utf-8"))
        return {name: Job(**{**job, "after": tuple(job["after"])}) for name, job in body["steps"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: broken ({error}); remove it once none of its jobs is left in the queue") from None


def write_jobs(out: Path, jobs: dict[str, Job]) -> None:
    """Keeps a pipeline's jobs."""
    body = {"steps": {name: asdict(job) for name, job in jobs.items()}}
    write_whole(out / FILE, json.dumps(body, indent=1) + "\n")


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Holds a pipeline's folder against a second `lavic submit`.

    Raises:
        ConfigError: Another one holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with Lock(out / ".submit.lock") as lock:
        if not lock.take():
            raise ConfigError(f"{out}: another `lavic submit` is at work here; wait for it")
        yield
