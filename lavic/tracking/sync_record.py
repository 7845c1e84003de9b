"""What each MLflow store has of a run: RUN/mlflow.json, by store."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from lavic.config.secrets import redact
from lavic.tracking.mlflow_store import store_key

_FILE = "mlflow.json"
LOST = "LOST"
"""Status of a run that was marked KILLED since no process held its journal; undone if the journal grows."""


@dataclass
class SyncRecord:
    """What one store has of one run."""

    id: str = ""
    """The run's id in its journal; empty in files from before there were ids."""
    run_id: str = ""
    """MLflow's id of the run."""
    uri: str = ""
    """The store's URI, without secrets."""
    offset: int = 0
    """Bytes of the journal that were sent."""
    last: dict[str, int] = field(default_factory=dict)
    """The last step sent, by metric."""
    system: dict[str, int] = field(default_factory=dict)
    """Bytes sent of each file of system metrics."""
    files: list[tuple[str, str | None]] = field(default_factory=list)
    """Files and folders that the store has still to take, absolute or below the run's folder, each with its folder
    among the artifacts."""
    status: str = ""
    """The run's status in the store: RUNNING, FINISHED, FAILED, KILLED; or `LOST`."""
    error: str = ""
    """Why the last attempt failed; empty after one that succeeded."""
    pid: int = 0
    """The process that wrote this."""

    def __post_init__(self) -> None:
        self.files = [(path, folder) for path, folder in self.files]  # JSON has lists


def read_record(run_dir: Path, uri: str) -> SyncRecord | None:
    """What the store at a URI, in any spelling, has of a run; None where nothing is recorded."""
    return read_records(run_dir).get(store_key(uri))


def read_records(run_dir: Path) -> dict[str, SyncRecord]:
    """What each store has of a run, by `store_key`."""
    try:
        stored = json.loads((run_dir / _FILE).read_text("utf-8"))
        field_names = {record_field.name for record_field in fields(SyncRecord)}
        return {
            store_key(store): SyncRecord(
                **{"uri": redact(store)} | {key: entry[key] for key in field_names & entry.keys()}
            )
            for store, entry in stored.items()
        }
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


def write_record(run_dir: Path, uri: str, record: SyncRecord) -> None:
    """Replaces what is recorded of one store. Mode 0600: `error` is text of the server's.

    The caller holds the run's lock, so a part file is one of a killed process and is replaced.
    """
    record.pid = os.getpid()
    state = {store: asdict(entry) for store, entry in read_records(run_dir).items()} | {store_key(uri): asdict(record)}
    part = run_dir / f".{_FILE}.part"
    part.unlink(missing_ok=True)
    part.touch(0o600)
    part.write_text(json.dumps(state, indent=1), "utf-8")
    part.replace(run_dir / _FILE)
