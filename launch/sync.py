"""`lavic sync`: sends runs' journals to MLflow, for nodes that had no network or a server that was down."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from lavic.config.loader import Positional, Reference, parse, settings
from lavic.config.secrets import redact
from lavic.errors import ConfigError, LavicError
from lavic.tracking.journal import FILE
from lavic.tracking.tracker import destination, sync

DESCRIPTION = """Sends the journals (metrics.jsonl) of runs to MLflow, from where they went on without it.

A run goes to the store that it was started with, or was sent to before. Runs that have none go to MLFLOW_TRACKING_URI,
else all of a folder to one mlflow.db in it. A point is never sent twice: a run is known by the id in its journal,
under whatever path, and what a store has of it stands in RUN/mlflow.json. Run it as often as you like, also while runs
go on. A run that was killed and could not say so is marked KILLED, one that goes on RUNNING. A run whose folder lies
inside another run's folder is shown below it.

  lavic sync runs/ --uri http://mlflow.example.org:5000 --experiment beauty

Credentials come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""


@settings
class Settings:
    """Which journals go where."""

    runs: Annotated[list[Path], Positional]
    """Run folders, or folders that hold runs at any depth."""
    uri: Annotated[str | None, Reference] = None
    """MLflow's address instead of each run's own; env:NAME or @FILE where it holds a password."""
    experiment: str | None = None
    """MLflow experiment; by default the one each run was started with. MLflow cannot move a run: one that is in another
    experiment already is refused."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    chosen = parse(Settings, argv, command="sync", description=DESCRIPTION)
    failed: list[LavicError] = []
    stores: dict[str, None] = {}
    for folder, place in find_runs(chosen.runs):
        try:
            feed = sync(folder, chosen.uri or destination(folder, place), chosen.experiment or "")
        except LavicError as error:
            failed.append(error)
            continue
        stores[feed.uri] = None
        print(f"{folder}: {feed.points} points -> {feed.uri} (run {feed.sent.run_id or 'none yet'})")
    for uri in stores:
        if uri.startswith("sqlite"):
            print(f"to look at: mlflow ui --backend-store-uri {shlex.quote(uri)}")
    for problem in failed[:-1]:
        print(f"lavic sync: error: {redact(str(problem))}", file=sys.stderr)
    if failed:
        raise failed[-1]
    return 0


def find_runs(places: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Each folder with a journal at or below a place, once, and the folder that holds the place's runs.

    Raises:
        ConfigError: A place without any.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    for place in places:
        here = sorted(path.parent for path in place.rglob(FILE))
        if not here:
            raise ConfigError(f"{place}: no {FILE} in it; give the folder of a run")
        above = place.resolve().parent if (place / FILE).is_file() else place.resolve()
        for folder in here:
            found.setdefault(folder.resolve(), (folder, above))
    yield from found.values()
