"""Feeds MLflow from a run's journal: what `lavic sync` does once and `lavic.follow` does while the run goes on.

What was sent stands in RUN/mlflow.json, per server: the MLflow run's id, how far the journal was read, and the last
step of each metric. A point is never sent twice: a resumed run's repeated steps are skipped.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lavic.errors import DataError, LaunchError
from lavic.journal import FILE, parse_line

STATE = "mlflow.json"
_BATCH = 1000
_LIMIT = {"param": 6000, "tag": 5000}


@dataclass
class Sent:
    """What one server has of one run."""

    run_id: str = ""
    offset: int = 0
    """Bytes of the journal that are dealt with."""
    last: dict[str, int] = field(default_factory=dict)
    """The last step sent, by metric."""
    error: str = ""
    """Why the last try failed; empty after one that did not."""
    pid: int = 0
    """The process that wrote this."""


class Feed:
    """One journal on its way to one MLflow server."""

    def __init__(self, run_dir: Path, uri: str, experiment: str = ""):
        """Takes the run's folder, MLflow's address, and an experiment instead of the one the journal names."""
        self.run_dir, self.uri, self.experiment = run_dir, uri, experiment
        self.sent = read_state(run_dir).get(uri, Sent())
        self.ended = False
        self.points = 0
        self._asked = False
        self._client: Any = None
        self._waiting: list[tuple[str, float, int, int]] = []

    def pump(self) -> bool:
        """Sends every whole line that is new; returns whether there was any. Raises whatever MLflow raises."""
        path = self.run_dir / FILE
        if path.stat().st_size < self.sent.offset or not self._run_is_there():
            self.sent = Sent()
        start = self.sent.offset
        self._waiting = []
        with path.open("rb") as journal:
            journal.seek(start)
            for line in journal:
                if not line.endswith(b"\n"):
                    break
                record = parse_line(line)
                if record is not None and "event" in record:
                    self._flush()
                    self._event(record)
                elif record is not None:
                    self._collect(record)
                self.sent.offset += len(line)
                if len(self._waiting) >= _BATCH or (record and "event" in record):
                    self._flush()
        self._flush()
        if self.sent.error:
            self.sent.error = ""
            self._save()
        return self.sent.offset > start

    def fail(self, error: Exception) -> str:
        """Notes why a try failed, goes back to what is known to be sent; returns the reason in one line."""
        self.sent = read_state(self.run_dir).get(self.uri, Sent())
        self.sent.error = " ".join(str(error).split())[:300] or type(error).__name__
        self._save()
        return self.sent.error

    def end(self, status: str) -> None:
        """Closes the MLflow run of a process that did not live to say how it ended."""
        if self.sent.run_id:
            self._mlflow().set_terminated(self.sent.run_id, status)

    def _collect(self, record: dict[str, Any]) -> None:
        step, when = int(record["step"]), _ms(record)
        for key, value in record.items():
            number = isinstance(value, (int, float)) and key not in ("step", "time")
            if number and step > self.sent.last.get(key, -1):
                self.sent.last[key] = step
                self._waiting.append((re.sub(r"[^\w\-. /]", "_", key), float(value), when, step))

    def _flush(self) -> None:
        """Sends what waits, then saves how far we are. After a crash in between MLflow drops the points it has."""
        if self._waiting:
            from mlflow.entities import Metric

            self._require_run({})
            points = [Metric(*point) for point in self._waiting]
            for first in range(0, len(points), _BATCH):
                self._mlflow().log_batch(self.sent.run_id, metrics=points[first : first + _BATCH])
            self.points += len(points)
            self._waiting = []
        self._save()

    def _event(self, record: dict[str, Any]) -> None:
        name = record["event"]
        if name == "start":
            self.ended = False
            self._require_run(record)
            self._describe(record.get("params") or {}, record.get("tags") or {})
        elif not self.sent.run_id:
            return
        elif name == "end":
            self.ended = True
            self._mlflow().set_terminated(self.sent.run_id, record.get("status") or "FINISHED", end_time=_ms(record))
        elif name == "artifact":
            path = self.run_dir / record["path"]
            if path.exists():
                send = self._mlflow().log_artifacts if path.is_dir() else self._mlflow().log_artifact
                send(self.sent.run_id, str(path), *([path.name] if path.is_dir() else []))
        else:
            fields = {key: value for key, value in record.items() if key not in ("event", "time")}
            self._mlflow().set_tag(self.sent.run_id, f"event.{name}", json.dumps(fields)[: _LIMIT["tag"]])

    def _require_run(self, start: dict[str, Any]) -> None:
        """Goes on with the MLflow run that is noted, else makes one."""
        client = self._mlflow()
        if self.sent.run_id:
            if start:
                client.update_run(self.sent.run_id, status="RUNNING")
            return
        tags = {"mlflow.source.name": "lavic", "mlflow.user": os.environ.get("USER", "")}
        if start.get("parent_run"):
            tags["mlflow.parentRunId"] = start["parent_run"]
        made = client.create_run(
            self._experiment(self.experiment or start.get("experiment") or "lavic"),
            run_name=start.get("run") or self.run_dir.resolve().name,
            start_time=_ms(start),
            tags=tags,
        )
        self.sent.run_id = made.info.run_id
        self._save()

    def _run_is_there(self) -> bool:
        """Whether the run that is noted still exists; asked once."""
        client = self._mlflow()
        from mlflow.exceptions import MlflowException

        if not self.sent.run_id or self._asked:
            return True
        try:
            found = client.get_run(self.sent.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        self._asked = True
        return bool(found.info.lifecycle_stage == "active")

    def _experiment(self, name: str) -> str:
        client = self._mlflow()
        found = client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        # Left alone, a local store puts artifacts below whatever folder the process happens to run in.
        local = re.match(r"sqlite:///(.+)", self.uri)
        place = (Path(local[1]).parent / "mlartifacts").absolute().as_uri() if local else None
        return str(client.create_experiment(name, artifact_location=place))

    def _describe(self, params: dict[str, Any], tags: dict[str, Any]) -> None:
        """Notes parameters; MLflow never changes one, so a changed one becomes a tag."""
        from mlflow.entities import Param, RunTag

        client = self._mlflow()
        there = client.get_run(self.sent.run_id).data.params
        texts = {key: str(value)[: _LIMIT["param"]] for key, value in params.items()}
        fresh = [Param(key, text) for key, text in texts.items() if key not in there]
        notes = {f"changed.{key}": text for key, text in texts.items() if there.get(key, text) != text} | tags
        for first in range(0, len(fresh), 100):
            client.log_batch(self.sent.run_id, params=fresh[first : first + 100])
        marks = [RunTag(key, str(value)[: _LIMIT["tag"]]) for key, value in notes.items()]
        for first in range(0, len(marks), 100):
            client.log_batch(self.sent.run_id, tags=marks[first : first + 100])

    def _mlflow(self) -> Any:
        if self._client is None:
            self._client = connect(self.uri)
        return self._client

    def _save(self) -> None:
        self.sent.pid = os.getpid()
        state = {uri: asdict(sent) for uri, sent in read_state(self.run_dir).items()} | {self.uri: asdict(self.sent)}
        aside = self.run_dir / f"{STATE}.{os.getpid()}"
        aside.write_text(json.dumps(state, indent=1), "utf-8")
        aside.replace(self.run_dir / STATE)


def read_state(run_dir: Path) -> dict[str, Sent]:
    """What each server has of a run, by its address."""
    try:
        return {uri: Sent(**fields) for uri, fields in json.loads((run_dir / STATE).read_text("utf-8")).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


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


def send(run_dir: Path, uri: str, experiment: str = "") -> Feed:
    """Sends what a server does not have yet of one run's journal.

    Raises:
        DataError: the folder holds no journal.
        LaunchError: MLflow is not installed or did not take it.
    """
    if not (run_dir / FILE).is_file():
        raise DataError(f"{run_dir}: holds no {FILE}; give the folder of a run")
    feed = Feed(run_dir, uri, experiment)
    try:
        feed.pump()
    except LaunchError:
        raise
    except Exception as error:
        raise LaunchError(f"{uri} did not take {run_dir}: {feed.fail(error)}") from error
    return feed


def _ms(record: dict[str, Any]) -> int:
    return int(1000 * (record.get("time") or time.time()))
