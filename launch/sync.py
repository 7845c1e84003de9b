"""`lavic sync`: sends runs' journals to MLflow, for nodes that had no network or a server that was down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from lavic.config import Positional, parse, settings
from lavic.errors import ConfigError
from lavic.journal import FILE
from lavic.tracking import sync

DESCRIPTION = """Sends the journals (metrics.jsonl) of runs to MLflow, from where they went on without it.

A point is never sent twice: what a server has of a run stands in RUN/mlflow.json. Run it as often as you like, also
while runs go on. A run that was killed and could not say so is marked KILLED, one that goes on RUNNING. A run whose
folder lies inside another run's folder is shown below it.

  lavic sync runs/ --uri http://mlflow.example.org:5000 --experiment beauty"""


@settings
class Settings:
    """Which journals go where."""

    runs: Annotated[list[Path], Positional]
    """Run folders, or folders that hold runs at any depth."""
    uri: str | None = None
    """MLflow's address. By default MLFLOW_TRACKING_URI, else mlflow.db (sqlite) beside each run."""
    experiment: str | None = None
    """MLflow experiment; by default the one each run was started with."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    chosen = parse(Settings, argv, command="sync", description=DESCRIPTION)
    for folder in find_runs(chosen.runs):
        feed = sync(folder, chosen.uri, chosen.experiment or "")
        print(f"{folder}: {feed.points} points -> {feed.uri} (run {feed.sent.run_id or 'none yet'})")
    return 0


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The folders with a journal at or below each place. Raises ConfigError for a place without any."""
    found: list[Path] = []
    for place in places:
        here = sorted(path.parent for path in place.rglob(FILE))
        if not here:
            raise ConfigError(f"{place}: no {FILE} in it; give the folder of a run")
        found += here
    return list(dict.fromkeys(found))
