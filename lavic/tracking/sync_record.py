"""What stores have of a run: RUN/mlflow.json, by store."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from lavic.config.secrets import redact
from lavic.tracking.tracking_uri import store_key

FILE = "mlflow.json"
LOST = "LOST"
"""The server was told KILLED, since nobody held the journal: taken back when a line comes after all."""


@dataclass
class Sent:
    """What one store has of one run."""

    id: str = ""
    """The run's id in its journal; empty in notes from before there were ids."""
    run_id: str = ""
    """MLflow's id of the run."""
    uri: str = ""
    """The store's address, as it may be recorded."""
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


def read_sent(run_dir: Path, uri: str) -> Sent | None:
    """What the store at an address has of a run, however the address is spelled; None where nothing was noted."""
    return read_state(run_dir).get(store_key(uri))


def read_state(run_dir: Path) -> dict[str, Sent]:
    """What each store has of a run, by `store_key`."""
    try:
        noted = json.loads((run_dir / FILE).read_text("utf-8"))
        known = {each.name for each in fields(Sent)}
        return {
            store_key(store): Sent(**{"uri": redact(store)} | {key: entry[key] for key in known & entry.keys()})
            for store, entry in noted.items()
        }
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


def write_state(run_dir: Path, uri: str, sent: Sent) -> None:
    """Notes what one store has; whole or not at all. For its owner alone: `error` is a server's own words.

    The caller holds the run's lock, so a file left by a killed writer is overwritten.
    """
    sent.pid = os.getpid()
    state = {store: asdict(entry) for store, entry in read_state(run_dir).items()} | {store_key(uri): asdict(sent)}
    aside = run_dir / f".{FILE}.part"
    aside.unlink(missing_ok=True)
    aside.touch(0o600)
    aside.write_text(json.dumps(state, indent=1), "utf-8")
    aside.replace(run_dir / FILE)
