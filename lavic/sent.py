"""What servers have of a run: RUN/mlflow.json, by address."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE = "mlflow.json"
LOST = "LOST"
"""The server was told KILLED, since nobody held the journal: taken back when a line comes after all."""


@dataclass
class Sent:
    """What one server has of one run."""

    run_id: str = ""
    offset: int = 0
    """Bytes of the journal that are dealt with."""
    last: dict[str, int] = field(default_factory=dict)
    """The last step sent, by metric."""
    system: dict[str, int] = field(default_factory=dict)
    """Bytes that are dealt with of each file of system metrics."""
    status: str = ""
    """The run's status as the server was told: RUNNING, FINISHED, FAILED, KILLED; or `LOST`."""
    error: str = ""
    """Why the last try failed; empty after one that did not."""
    pid: int = 0
    """The process that wrote this."""


def read_state(run_dir: Path) -> dict[str, Sent]:
    """What each server has of a run, by its address."""
    try:
        return {uri: Sent(**fields) for uri, fields in json.loads((run_dir / FILE).read_text("utf-8")).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


def write_state(run_dir: Path, uri: str, sent: Sent) -> None:
    """Notes what one server has; whole or not at all."""
    sent.pid = os.getpid()
    state = {each: asdict(there) for each, there in read_state(run_dir).items()} | {uri: asdict(sent)}
    aside = run_dir / f"{FILE}.{os.getpid()}"
    aside.write_text(json.dumps(state, indent=1), "utf-8")
    aside.replace(run_dir / FILE)
