"""An MLflow server or store, as much of it as a run needs. The only module that imports mlflow."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import posixpath
import re
import sqlite3
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavic.config.secrets import redact
from lavic.errors import LaunchError
from lavic.storage.file_lock import Lock
from lavic.tracking.tracking_uri import anchored, lock_path, sqlite_path, sqlite_uri

BATCH = 1000
"""Points that MLflow takes at once."""
ID_TAG = "lavic.run_id"
"""The tag that holds a run's id in its journal, by which a store knows it from wherever it is sent."""
_LIMIT = {"param": 6000, "tag": 5000}
_LONGEST = 250
"""Letters of a name that MLflow takes."""
_ODD = re.compile(r"[^\w\-. /]")
_PATIENCE_S = 120.0
"""How long to wait for another process that makes a store or a run in it: making one takes seconds."""

Point = tuple[str, float, int, int]
"""Name, value, time (ms), step."""


class Server:
    """Talks to one MLflow address. Every method raises whatever MLflow raises."""

    def __init__(self, uri: str) -> None:
        """Connects when first asked."""
        self.uri = uri
        self._made: Any = None

    @property
    def client(self) -> Any:
        """The MlflowClient.

        Raises:
            LaunchError: mlflow is not installed.
        """
        if self._made is None:
            self._made = connect(self.uri)
        return self._made

    def has(self, run_id: str) -> bool:
        """Whether a run is there and was not deleted. One that was deleted with its experiment comes back with it."""
        client = self.client
        from mlflow.exceptions import MlflowException

        try:
            info = client.get_run(run_id).info
            if info.lifecycle_stage != "active" and self._restored(info.experiment_id):
                info = client.get_run(run_id).info
            return bool(info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return False

    def experiment_of(self, run_id: str) -> str:
        """The name of a run's experiment."""
        return str(self.client.get_experiment(self.client.get_run(run_id).info.experiment_id).name)

    def find(self, journal_id: str) -> str | None:
        """MLflow's id of the run with an id of ours, wherever it was sent from; None where there is none."""
        client = self.client
        from mlflow.entities import ViewType

        places, page = [], None
        while page is None or page:
            found = client.search_experiments(ViewType.ALL, max_results=BATCH, page_token=page)
            places += [experiment.experiment_id for experiment in found]
            page = found.token or ""
        wanted = f"tags.`{ID_TAG}` = '{journal_id}'"
        for first in range(0, len(places), 100):
            runs = client.search_runs(places[first : first + 100], wanted, ViewType.ALL, max_results=100)
            for run in sorted(runs, key=lambda run: run.info.lifecycle_stage):  # active before deleted
                if self.has(run.info.run_id):
                    return str(run.info.run_id)
        return None

    def open(
        self,
        journal_id: str,
        name: str,
        *,
        experiment: str,
        parent: str | None,
        start_ms: int,
        tags: Mapping[str, str],
    ) -> tuple[str, bool]:
        """Finds a run, or makes it: below another one in that one's experiment.

        Returns:
            MLflow's id, and whether the run was there.
        """
        client = self.client  # a store that is not there yet is made under the same lock
        with alone(self.uri):
            found = self.find(journal_id)
            if found is not None:
                return found, True
            place = client.get_run(parent).info.experiment_id if parent else self._experiment(_text(experiment))
            marks = dict(tags) | {ID_TAG: journal_id} | ({"mlflow.parentRunId": parent} if parent else {})
            made = client.create_run(place, run_name=_text(name)[:_LONGEST], start_time=start_ms, tags=marks)
            return str(made.info.run_id), False

    def last_steps(self, run_id: str) -> dict[str, int]:
        """The last step of each metric that the store has of a run."""
        names = self.client.get_run(run_id).data.metrics
        return {name: max(p.step for p in self.client.get_metric_history(run_id, name)) for name in names}

    def running(self, run_id: str) -> None:
        """Marks a run that goes on."""
        self.client.update_run(run_id, status="RUNNING")

    def end(self, run_id: str, status: str, end_ms: int) -> None:
        """Marks how a run ended."""
        self.client.set_terminated(run_id, status, end_time=end_ms)

    def points(self, run_id: str, points: Sequence[Point]) -> None:
        """Adds points of metrics. A database drops those that it has already."""
        self.client  # noqa: B018 (sets mlflow up before it is imported)
        from mlflow.entities import Metric

        metrics = [Metric(mlflow_name(name), value, when, step) for name, value, when, step in points]
        for first in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics=metrics[first : first + BATCH])

    def params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Notes parameters; MLflow never changes one, so a changed one becomes the tag `changed.NAME`."""
        there = self.client.get_run(run_id).data.params
        from mlflow.entities import Param

        texts = {mlflow_name(key): _text(str(value))[: _LIMIT["param"]] for key, value in params.items()}
        fresh = [Param(key, text) for key, text in texts.items() if key not in there]
        for first in range(0, len(fresh), 100):
            self.client.log_batch(run_id, params=fresh[first : first + 100])
        self.tags(run_id, {f"changed.{key}": text for key, text in texts.items() if there.get(key, text) != text})

    def tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Sets tags; what is no text becomes JSON."""
        self.client  # noqa: B018
        from mlflow.entities import RunTag

        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in tags.items()}
        marks = [RunTag(mlflow_name(key), _text(text)[: _LIMIT["tag"]]) for key, text in texts.items()]
        for first in range(0, len(marks), 100):
            self.client.log_batch(run_id, tags=marks[first : first + 100])

    def dataset(self, run_id: str, *, name: str, digest: str, path: str, context: str, profile: str) -> None:
        """Notes what a run reads."""
        self.client  # noqa: B018
        from mlflow.entities import Dataset, DatasetInput, InputTag

        name, path = _text(name)[:_LONGEST], _text(path)
        made = Dataset(name=name, digest=digest[:36], source_type="local", source=path, profile=profile)
        marks = [InputTag("mlflow.data.context", context)] if context else []
        self.client.log_inputs(run_id, datasets=[DatasetInput(made, marks)])

    def artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Copies a file or a folder, into `folder` of the run's artifacts."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), folder or path.name)
        elif path.exists():
            self.client.log_artifact(run_id, str(path), folder)

    def _experiment(self, name: str) -> str:
        client = self.client
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name, artifact_location=_artifacts(self.uri)))
            except MlflowException as error:  # made meanwhile, from another machine
                found = client.get_experiment_by_name(name)
                if found is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        self._restored(found.experiment_id)
        return str(found.experiment_id)

    def _restored(self, experiment_id: str) -> bool:
        """Brings an experiment back that was deleted, with its runs: another one may not have its name."""
        if self.client.get_experiment(experiment_id).lifecycle_stage != "deleted":
            return False
        self.client.restore_experiment(experiment_id)
        return True


def mlflow_name(name: str) -> str:
    """A name as MLflow takes it for a metric, parameter or tag; names that differ stay different."""
    clean = posixpath.normpath("/" + _ODD.sub("_", name)).strip("/") or "_"
    if clean == name and len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{clean[: _LONGEST - 9]}-{digest}"


def _text(text: str) -> str:
    """Text that any database takes."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """Keeps other processes from making the same store, or the same run in it, at the same time.

    Raises:
        LaunchError: Another process has been at it for two minutes.
    """
    path = lock_path(uri)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # where no lock can be, nobody is kept out
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(Lock(path))
            if not lock.take(_PATIENCE_S):
                raise LaunchError(f"{redact(uri)}: another process is setting it up and does not end ({path})")
        yield


def _artifacts(uri: str) -> str | None:
    """Where a local store keeps artifacts: left alone, below whatever folder the process happens to run in."""
    path = sqlite_path(uri)
    return None if path is None else (path.parent / "mlartifacts").as_uri()


def _make_sqlite(path: Path) -> None:
    """Makes a store that is not there yet: aside, and put in place whole, so that no process sees half of one.

    Raises:
        LaunchError: What is there is no MLflow store, or one that was never finished.
    """
    if path.exists() and path.stat().st_size:
        _check_sqlite(path)
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with alone(sqlite_uri(path)):
        if path.exists() and path.stat().st_size:
            return
        for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*.part*"):  # by a process that was killed
            unfinished.unlink(missing_ok=True)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            uri = sqlite_uri(aside)
            SqlAlchemyStore(uri, _artifacts(uri)).engine.dispose()
            if path.exists():
                aside.replace(path)  # an empty file
            else:
                _put(aside, path)
        finally:
            for file in path.parent.glob(f"{glob.escape(aside.name)}*"):  # with SQLite's journal
                file.unlink(missing_ok=True)


def _check_sqlite(path: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            database.execute("SELECT version_num FROM alembic_version")
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            return  # locked, or not ours to read: MLflow says so
    except sqlite3.DatabaseError:
        pass
    else:
        return
    raise LaunchError(
        f"{path}: not a whole MLflow store; move it away, then 'lavic sync' fills a new one from the runs' journals"
    )


def _put(aside: Path, path: Path) -> None:
    """Gives a file its name, unless another machine, which no lock reaches, has been faster."""
    try:
        os.link(aside, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        aside.replace(path)


def connect(uri: str) -> Any:
    """An MlflowClient that gives up soon and talks little.

    Raises:
        LaunchError: mlflow is not installed.
    """
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        os.environ.setdefault(name, value)
    try:
        Path.home()
    except RuntimeError:  # MLflow cannot be imported by a user without a home; so does Debian call that of `nobody`
        os.environ["HOME"] = "/nonexistent"
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError:
        raise LaunchError("MLflow is not installed; install it with: pip install 'lavic[mlflow]'") from None
    for noisy in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    path = sqlite_path(uri)
    if path is not None:
        _make_sqlite(path)
        uri = anchored(uri)  # MLflow makes the parent folder of one that is quoted otherwise
    return MlflowClient(tracking_uri=uri)
