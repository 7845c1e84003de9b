"""Settings of tracking, and the MLflow store that a run belongs to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import NonNegativeFloat, field_validator

from lavic.config import Reference, settings
from lavic.config.secrets import MASK, holds_secret, reveal
from lavic.errors import ConfigError
from lavic.tracking.journal import JOURNAL_FILE, last_start, parent_run_dirs
from lavic.tracking.mlflow_store import absolute_uri, default_store_uri, sqlite_path
from lavic.tracking.sync_record import read_records

_VARIABLE = "MLFLOW_TRACKING_URI"


@settings
class TrackingSettings:
    """Where the run is recorded besides its own journal, RUN/metrics.jsonl."""

    mlflow: bool = False
    """Send the journal to MLflow during the run. `lavic sync` sends it afterwards."""
    uri: Annotated[str | None, Reference] = None
    """MLflow tracking URI. Default: MLFLOW_TRACKING_URI, else mlflow.db (SQLite) beside the run's folder. Pass
    credentials in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN. Give a URI that
    contains a password as env:NAME, a variable, or @FILE, a file that holds nothing else."""
    experiment: str = "lavic"
    """MLflow experiment."""
    run: str | None = None
    """MLflow run name; by default the name of the run's folder."""
    parent_run: str | None = None
    """Id of the parent MLflow run; by default the run whose folder this run's folder lies in."""
    system_every: NonNegativeFloat = 10.0
    """Seconds between samples of each node's CPU, memory, disk, network and GPUs; 0 for none."""

    @field_validator("uri")
    @classmethod
    def _absolute(cls, uri: str | None) -> str | None:
        """It is recorded, and read again from other folders."""
        return absolute_uri(uri) if uri else uri

    @property
    def chosen_uri(self) -> str:
        """The URI that the user chose, in a form that may be recorded; "" for none."""
        uri = self.uri or os.environ.get(_VARIABLE, "")
        return f"env:{_VARIABLE}" if not self.uri and holds_secret(uri) else uri

    def recorded_uri(self, run_dir: Path) -> str:
        """The URI for a run in `run_dir`, in a form that may be recorded and written on a command line."""
        return self.chosen_uri or default_store_uri(run_dir.resolve().parent)

    def resolve_uri(self, run_dir: Path) -> str:
        """The URI for a run in `run_dir`, with secrets. Raises ConfigError where its variable or file is missing."""
        return reveal(self.recorded_uri(run_dir), "--tracking.uri")


def destination(run_dir: Path, runs_dir: Path | None = None) -> str:
    """The store of a run: the one it was started with or sent to, else that of the run whose folder it lies in.

    Runs without a store go to MLFLOW_TRACKING_URI, else to mlflow.db in `runs_dir`, by default the folder above the
    run's.
    """
    for folder in (run_dir.resolve(), *parent_run_dirs(run_dir)):
        if store := _recorded_store(folder):
            return store
    return TrackingSettings().chosen_uri or default_store_uri(runs_dir or run_dir.resolve().parent)


def _recorded_store(run_dir: Path) -> str:
    """The store that a run was started with, else the last one that it was sent to; "" for none."""
    start = last_start(run_dir / JOURNAL_FILE)
    if start.get("uri"):
        path = sqlite_path(start["uri"])
        if start.get("by_default") and path is not None and not path.parent.is_dir():
            return default_store_uri(run_dir.resolve().parent)  # run and store were moved together
        if MASK in start["uri"]:
            raise ConfigError(f"{run_dir}: the store's URI held a password, which is not recorded: give --uri")
        return str(start["uri"])
    stores = [record.uri or store for store, record in read_records(run_dir).items() if record.run_id]
    return stores[-1] if stores else ""
