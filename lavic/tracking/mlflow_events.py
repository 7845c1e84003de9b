"""Sends the events of a journal to a run in MLflow: tags, parameters, datasets, artifacts, plots and the status."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from lavic.tracking import plots
from lavic.tracking.journal import milliseconds
from lavic.tracking.mlflow_client import StoreClient, valid_name


def send_event(store: StoreClient, run_id: str, run_dir: Path, event: dict[str, Any]) -> str:
    """Sends one event of the journal in `run_dir`; returns the run's new status, or "" if the event does not set it."""
    match event["event"]:
        case "start":
            store.log_params(run_id, event.get("params") or {})
            store.set_tags(run_id, event.get("tags") or {})
        case "end":
            status = str(event.get("status") or "FINISHED")
            if status != "KILLED":  # a killed process has no time for plots, and the run will be resumed
                with contextlib.suppress(OSError):
                    for plot in plots.draw(run_dir):
                        store.log_artifact(run_id, plot, plots.FOLDER)
            store.client.set_terminated(run_id, status, end_time=milliseconds(event))
            return status
        case "artifact":
            store.log_artifact(run_id, run_dir / event["path"])
        case "tags":
            store.set_tags(run_id, event["tags"])
        case "dataset":
            _send_dataset(store, run_id, event)
        case name:
            fields = {key: value for key, value in event.items() if key not in ("event", "time")}
            store.set_tags(run_id, {f"event.{name}": fields})
    return ""


def _send_dataset(store: StoreClient, run_id: str, event: dict[str, Any]) -> None:
    manifest = Path(event["manifest"]) if event.get("manifest") else None
    profile: dict[str, Any] = {}
    if manifest and manifest.is_file():
        store.log_artifact(run_id, manifest, f"data/{valid_name(event['name'])}")
        values = json.loads(manifest.read_text("utf-8"))
        profile = {key: value for key, value in values.items() if isinstance(value, (str, int, float))}
    store.log_dataset(
        run_id,
        name=event["name"],
        digest=event["digest"],
        path=event["path"],
        context=event.get("context") or "",
        profile=json.dumps(profile),
    )
