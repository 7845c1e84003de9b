"""`lavic sync`: sends runs' journals to MLflow, for nodes without network or after a server was down."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from lavic.config import Positional, Reference, parse, settings
from lavic.config.secrets import redact
from lavic.errors import ConfigError, LavicError
from lavic.tracking.journal import JOURNAL_FILE
from lavic.tracking.mlflow_sync import sync
from lavic.tracking.settings import destination

DESCRIPTION = """Sends the journals (metrics.jsonl) of runs to MLflow, from where MLflow has them.

A run goes to the store that it was started with or was sent to before. Runs without a store go to MLFLOW_TRACKING_URI,
else all runs of a folder to one mlflow.db in that folder. No point is sent twice: a run is known by the id in its
journal, under any path, and RUN/mlflow.json records what each store has. Run this command as often as you like, also
during the runs. A run that was killed is marked KILLED, one that continues RUNNING. A run whose folder lies inside
another run's folder becomes its child run.

  lavic sync runs/ --uri http://mlflow.example.org:5000 --experiment beauty

Credentials come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""


@settings
class Settings:
    """Which journals go where."""

    runs: Annotated[list[Path], Positional]
    """Run folders, or folders that contain runs at any depth."""
    uri: Annotated[str | None, Reference] = None
    """MLflow tracking URI, instead of each run's own; env:NAME or @FILE if it holds a password."""
    experiment: str | None = None
    """MLflow experiment; by default the one that each run was started with. A run that is in another experiment already
    is refused, since MLflow cannot move runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse(Settings, argv, command="sync", description=DESCRIPTION)
    errors: list[LavicError] = []
    stores: dict[str, None] = {}
    for run_dir, runs_dir in find_runs(args.runs):
        try:
            run = sync(run_dir, args.uri or destination(run_dir, runs_dir), args.experiment or "")
        except LavicError as error:
            errors.append(error)
            continue
        stores[run.uri] = None
        print(f"{run_dir}: {run.points_sent} points -> {run.uri} (run {run.record.run_id or 'none yet'})")
    for uri in stores:
        if uri.startswith("sqlite"):
            print(f"view with: mlflow ui --backend-store-uri {shlex.quote(uri)}")
    for problem in errors[:-1]:
        print(f"lavic sync: error: {redact(str(problem))}", file=sys.stderr)
    if errors:
        raise errors[-1]
    return 0


def find_runs(folders: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Each folder with a journal in or below some folders, once, and the folder whose store takes it by default.

    Raises:
        ConfigError: A folder without runs.
    """
    runs: dict[Path, tuple[Path, Path]] = {}
    for folder in folders:
        run_dirs = sorted(path.parent for path in folder.rglob(JOURNAL_FILE))
        if not run_dirs:
            raise ConfigError(f"{folder}: no {JOURNAL_FILE} in it; give the folder of a run")
        runs_dir = folder.resolve().parent if (folder / JOURNAL_FILE).is_file() else folder.resolve()
        for run_dir in run_dirs:
            runs.setdefault(run_dir.resolve(), (run_dir, runs_dir))
    yield from runs.values()
