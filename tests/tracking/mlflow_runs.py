"""Runs for the tests of MLflow, and what a store has of them."""

from __future__ import annotations

import json
from pathlib import Path

from lavic.tracking.journal import Journal
from lavic.tracking.mlflow_store import default_store_uri
from lavic.tracking.settings import TrackingSettings
from lavic.tracking.sync_record import read_record
from lavic.tracking.tracker import Tracker


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tracked(
    run: Path, steps: range, *, status: str = "FINISHED", settings: TrackingSettings | None = None, **params
) -> None:
    """A run from the outside: starts, logs a loss per step, ends."""
    tracker = Tracker(Journal(run / "metrics.jsonl"), settings, timeout_s=240)  # a loaded machine imports mlflow slowly
    tracker.start("distill", {"lr": 0.1, **params}, {"stage": "1"})
    for step in steps:
        tracker.log(step, loss=1 / step, **({"valid_loss": 2 / step} if step % 2 else {}))
    tracker.finish(status)


class Store:
    """What MLflow holds of a run."""

    def __init__(self, uri: str, run_id: str):
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        self.run = self.client.get_run(run_id)

    def points(self, key: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(self.run.info.run_id, key)
        return sorted((point.step, point.value) for point in history)


def stored(run: Path, uri: str | None = None) -> Store:
    uri = uri or default_store_uri(run.resolve().parent)
    return Store(uri, read_record(run, uri).run_id)
