"""The calls to an MLflow server or store that sending a run needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import posixpath
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lavic.errors import LaunchError
from lavic.tracking import plots
from lavic.tracking.journal import milliseconds
from lavic.tracking.mlflow_store import (
    NOT_INSTALLED,
    absolute_uri,
    artifacts_uri,
    create_if_missing,
    sqlite_path,
    store_lock,
)

BATCH_SIZES = {"metrics": 1000, "params": 100, "tags": 100}
"""How many MLflow takes in one request."""
ID_TAG = "lavic.run_id"
"""The tag with a run's id in its journal: a store knows the run by it, from wherever it is sent."""
_MAX_LENGTHS = {"name": 250, "param": 6000, "tag": 5000}
"""Characters that MLflow takes."""
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")

Point = tuple[str, float, int, int]
"""Name, value, time (ms), step."""


class StoreClient:
    """One MLflow tracking URI; connects at the first call. Methods raise whatever MLflow raises."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @cached_property
    def client(self) -> Any:
        """The MlflowClient. Raises LaunchError where mlflow is not installed."""
        return connect(self.uri)

    @cached_property
    def _entities(self) -> Any:
        assert self.client  # sets the environment up before mlflow is imported
        from mlflow import entities

        return entities

    def has_run(self, run_id: str) -> bool:
        """Whether a run exists and is not deleted. If its experiment is deleted, both are restored."""
        client = self.client
        from mlflow.exceptions import MlflowException

        try:
            info = client.get_run(run_id).info
            if info.lifecycle_stage != "active" and self._restore_experiment(info.experiment_id):
                info = client.get_run(run_id).info
            return bool(info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return False

    def experiment_name(self, run_id: str) -> str:
        """The name of a run's experiment."""
        return str(self.client.get_experiment(self.client.get_run(run_id).info.experiment_id).name)

    def find_run(self, journal_id: str) -> str | None:
        """MLflow's id of the run with a journal's id, in any experiment; None where there is none."""
        all_stages = self._entities.ViewType.ALL
        experiments, page = [], None
        while page is None or page.token:
            page = self.client.search_experiments(all_stages, page_token=page.token if page else None)
            experiments += [experiment.experiment_id for experiment in page]
        query = f"tags.`{ID_TAG}` = '{journal_id}'"
        for first in range(0, len(experiments), 100):
            runs = self.client.search_runs(experiments[first : first + 100], query, all_stages, max_results=100)
            for run in sorted(runs, key=lambda run: run.info.lifecycle_stage):  # active before deleted
                if self.has_run(run.info.run_id):
                    return str(run.info.run_id)
        return None

    def open_run(
        self, journal_id: str, name: str, *, experiment: str, parent: str | None, start_ms: int
    ) -> tuple[str, bool]:
        """Finds or creates a run, below a parent in its experiment; returns MLflow's id and whether the run existed."""
        client = self.client  # outside of the lock, which creates the store itself
        with store_lock(self.uri):
            existing = self.find_run(journal_id)
            if existing is not None:
                return existing, True
            experiment_id = client.get_run(parent).info.experiment_id if parent else self.experiment_id(experiment)
            tags = {"mlflow.source.name": "lavic", ID_TAG: journal_id}
            if parent:
                tags["mlflow.parentRunId"] = parent
            name = valid_text(name)[: _MAX_LENGTHS["name"]]
            run = client.create_run(experiment_id, run_name=name, start_time=start_ms, tags=tags)
            return str(run.info.run_id), False

    def last_steps(self, run_id: str) -> dict[str, int]:
        """The last step of each metric that the store has of a run."""
        names = self.client.get_run(run_id).data.metrics
        return {name: max(point.step for point in self.client.get_metric_history(run_id, name)) for name in names}

    def log_metrics(self, run_id: str, points: Sequence[Point]) -> None:
        """Adds points of metrics. A database ignores those that it has already."""
        metric = self._entities.Metric
        self._log(run_id, "metrics", [metric(valid_name(name), *values) for name, *values in points])

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Sets parameters. MLflow never changes one: the new value of a changed one becomes the tag `changed.NAME`."""
        existing = self.client.get_run(run_id).data.params
        texts = {valid_name(key): valid_text(str(value))[: _MAX_LENGTHS["param"]] for key, value in params.items()}
        new = [self._entities.Param(key, text) for key, text in texts.items() if key not in existing]
        self._log(run_id, "params", new)
        changed = {f"changed.{key}": text for key, text in texts.items() if existing.get(key, text) != text}
        self.set_tags(run_id, changed)

    def set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Sets tags; a value that is not text becomes JSON."""
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in tags.items()}
        run_tag, max_length = self._entities.RunTag, _MAX_LENGTHS["tag"]
        self._log(
            run_id, "tags", [run_tag(valid_name(key), valid_text(text)[:max_length]) for key, text in texts.items()]
        )

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Copies a file or a folder, into `folder` of the run's artifacts."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), folder or path.name)
        elif path.exists():
            self.client.log_artifact(run_id, str(path), folder)

    def log_event(self, run_id: str, event: dict[str, Any]) -> str:
        """Sends an event of a journal without its files; returns the run's new status, or "" if the event sets none."""
        match event["event"]:
            case "start":
                self.log_params(run_id, event.get("params") or {})
                self.set_tags(run_id, event.get("tags") or {})
            case "end":
                status = str(event.get("status") or "FINISHED")
                self.client.set_terminated(run_id, status, end_time=milliseconds(event))
                return status
            case "artifact":
                pass
            case "tags":
                self.set_tags(run_id, event["tags"])
            case "dataset":
                self._log_dataset(run_id, event)
            case name:
                fields = {key: value for key, value in event.items() if key not in ("event", "time")}
                self.set_tags(run_id, {f"event.{name}": fields})
        return ""

    def _log_dataset(self, run_id: str, event: dict[str, Any]) -> None:
        manifest = Path(event["manifest"]) if event.get("manifest") else None
        profile: dict[str, Any] = {}
        if manifest and manifest.is_file():
            values = json.loads(manifest.read_text("utf-8"))
            profile = {key: value for key, value in values.items() if isinstance(value, (str, int, float))}
        dataset = self._entities.Dataset(
            name=valid_text(event["name"])[: _MAX_LENGTHS["name"]],
            digest=event["digest"][:36],
            source_type="local",
            source=valid_text(event["path"]),
            profile=json.dumps(profile),
        )
        context = event.get("context")
        tags = [self._entities.InputTag("mlflow.data.context", context)] if context else []
        self.client.log_inputs(run_id, datasets=[self._entities.DatasetInput(dataset, tags)])

    def _log(self, run_id: str, kind: str, entries: Sequence[Any]) -> None:
        size = BATCH_SIZES[kind]
        for first in range(0, len(entries), size):
            self.client.log_batch(run_id, **{kind: entries[first : first + size]})

    def experiment_id(self, name: str) -> str:
        """The id of an experiment, which is created or restored."""
        client, path, name = self.client, sqlite_path(self.uri), valid_text(name)
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name, artifacts_uri(path) if path else None))
            except MlflowException as error:  # perhaps created meanwhile on another machine
                experiment = client.get_experiment_by_name(name)
                if experiment is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        self._restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _restore_experiment(self, experiment_id: str) -> bool:
        """Restores a deleted experiment with its runs: MLflow refuses a second one of its name."""
        if self.client.get_experiment(experiment_id).lifecycle_stage != "deleted":
            return False
        self.client.restore_experiment(experiment_id)
        return True


def event_files(run_dir: Path, event: dict[str, Any]) -> list[tuple[Path, str | None]]:
    """What an event of the journal in `run_dir` adds to the run's artifacts.

    Returns:
        Files and folders, absolute or below `run_dir`, each with its folder among the artifacts.
    """
    match event["event"]:
        case "artifact":
            return [(Path(event["path"]), None)]
        case "dataset" if event.get("manifest"):
            return [(Path(event["manifest"]), f"data/{valid_name(event['name'])}")]
        case "end" if event.get("status") != "KILLED":  # a killed process has no time for plots, and will be resumed
            with contextlib.suppress(OSError):
                return [(plot.relative_to(run_dir), plots.FOLDER) for plot in plots.draw(run_dir)]
    return []


def valid_name(name: str) -> str:
    """A name that MLflow takes for a metric, parameter or tag; different names stay different."""
    max_length = _MAX_LENGTHS["name"]
    cleaned = posixpath.normpath("/" + _NOT_IN_NAMES.sub("_", name)).strip("/") or "_"
    if cleaned == name and len(name) <= max_length:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{cleaned[: max_length - 9]}-{digest}"


def valid_text(text: str) -> str:
    """Text that every database takes."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")


def connect(uri: str) -> Any:
    """An MlflowClient with short timeouts and without log output; creates a SQLite store that is missing.

    Raises:
        LaunchError: mlflow is not installed.
    """
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "true" if sys.stderr.isatty() else "false",
    }.items():
        os.environ.setdefault(name, value)
    try:
        Path.home()
    except RuntimeError:  # a user without a home, who cannot import mlflow; Debian's `nobody` has this one
        os.environ["HOME"] = "/nonexistent"
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError:
        raise LaunchError(NOT_INSTALLED) from None
    for library in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(library).setLevel(logging.ERROR)
    path = sqlite_path(uri)
    if path is not None:
        create_if_missing(path)
        uri = absolute_uri(uri)  # MLflow makes the parent folder of a URI in another spelling
    return MlflowClient(tracking_uri=uri)
