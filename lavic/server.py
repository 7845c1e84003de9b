"""An MLflow server or store, as much of it as a run needs. The only module that imports mlflow."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavic.errors import LaunchError

BATCH = 1000
"""Points that MLflow takes at once."""
_LIMIT = {"param": 6000, "tag": 5000}
_ODD = re.compile(r"[^\w\-. /]")

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
        """Whether a run is there and was not deleted."""
        client = self.client
        from mlflow.exceptions import MlflowException

        try:
            return bool(client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def create(self, name: str, *, experiment: str, parent: str | None, start_ms: int, tags: Mapping[str, str]) -> str:
        """Makes a run, below another one in that one's experiment, and gives its id."""
        place = self.client.get_run(parent).info.experiment_id if parent else self._experiment(experiment)
        its = dict(tags) | ({"mlflow.parentRunId": parent} if parent else {})
        made = self.client.create_run(place, run_name=name, start_time=start_ms, tags=its)
        return str(made.info.run_id)

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

        metrics = [Metric(_ODD.sub("_", name), value, when, step) for name, value, when, step in points]
        for first in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics=metrics[first : first + BATCH])

    def params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Notes parameters; MLflow never changes one, so a changed one becomes the tag `changed.NAME`."""
        there = self.client.get_run(run_id).data.params
        from mlflow.entities import Param

        texts = {_ODD.sub("_", key): str(value)[: _LIMIT["param"]] for key, value in params.items()}
        fresh = [Param(key, text) for key, text in texts.items() if key not in there]
        for first in range(0, len(fresh), 100):
            self.client.log_batch(run_id, params=fresh[first : first + 100])
        self.tags(run_id, {f"changed.{key}": text for key, text in texts.items() if there.get(key, text) != text})

    def tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Sets tags; what is no text becomes JSON."""
        self.client  # noqa: B018
        from mlflow.entities import RunTag

        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in tags.items()}
        marks = [RunTag(_ODD.sub("_", key), text[: _LIMIT["tag"]]) for key, text in texts.items()]
        for first in range(0, len(marks), 100):
            self.client.log_batch(run_id, tags=marks[first : first + 100])

    def dataset(self, run_id: str, *, name: str, digest: str, path: str, context: str, profile: str) -> None:
        """Notes what a run reads."""
        self.client  # noqa: B018
        from mlflow.entities import Dataset, DatasetInput, InputTag

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
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        # Left alone, a local store puts artifacts below whatever folder the process happens to run in.
        local = re.match(r"sqlite:///(.+)", self.uri)
        place = (Path(local[1]).parent / "mlartifacts").absolute().as_uri() if local else None
        return str(self.client.create_experiment(name, artifact_location=place))


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
        from mlflow import MlflowClient
    except ModuleNotFoundError:
        raise LaunchError("MLflow is not installed; install it with: pip install 'lavic[mlflow]'") from None
    for noisy in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)
