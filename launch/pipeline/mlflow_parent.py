"""The pipeline's MLflow run, the parent of its stages' runs: opened by `lavic submit`, closed by `submit status`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from lavic.config import flatten
from lavic.config.cli_args import to_args
from lavic.errors import LavicError
from lavic.launch.pipeline.dag import Layout
from lavic.launch.pipeline.settings import PipelineSettings
from lavic.launch.pipeline.step_status import StepStatus
from lavic.tracking.journal import JOURNAL_FILE, read_lines
from lavic.tracking.mlflow_sync import sync
from lavic.tracking.sync_record import read_record
from lavic.tracking.tracker import Tracker

log = logging.getLogger(__name__)


def tracking_uri(pipeline: PipelineSettings) -> str:
    """The tracking URI of the pipeline and all its stages, in a form that may appear on a job's command line."""
    return pipeline.tracking.recorded_uri(Layout(pipeline.out).runs)


def open_parent(pipeline: PipelineSettings) -> str:
    """The id of the pipeline's MLflow run; "" where MLflow is off, or does not answer, which is logged.

    A pipeline that is submitted again continues its run.
    """
    if not pipeline.tracking.mlflow:
        return ""
    out = Layout(pipeline.out).out
    settings = replace(pipeline.tracking, mlflow=False, uri=tracking_uri(pipeline))  # synced below, not live
    tracker = Tracker.open(out, settings)
    tracker.start(out.name, flatten(pipeline), {"lavic.pipeline": str(out)}, attended=False)
    tracker.detach()
    _sync(pipeline)
    record = read_record(out, pipeline.tracking.resolve_uri(Layout(pipeline.out).runs))
    return record.run_id if record else ""


def tracking_args(step_name: str, settings: Any, pipeline: PipelineSettings, parent: str) -> list[str]:
    """The arguments that put a step's run below `parent`, the id of the pipeline's run (or ""), under the step's name.

    Empty for a command that does not report to MLflow.
    """
    return list(to_args(tracking_settings(pipeline, step_name, parent))) if hasattr(settings, "tracking") else []


def tracking_settings(pipeline: PipelineSettings, run: str, parent: str) -> dict[str, Any]:
    """The settings that put a run of this name below `parent`; empty if the pipeline does not report to MLflow."""
    if not pipeline.tracking.mlflow:
        return {}
    values = {"mlflow": True, "uri": tracking_uri(pipeline), "experiment": pipeline.tracking.experiment, "run": run}
    return {"tracking": {**values, **({"parent_run": parent} if parent else {})}}


def close_parent(pipeline: PipelineSettings, statuses: Iterable[StepStatus]) -> None:
    """Ends the pipeline's run as FINISHED or FAILED, once none of its steps is running or waiting."""
    journal = Layout(pipeline.out).out / JOURNAL_FILE
    if not pipeline.tracking.mlflow or not journal.is_file():
        return
    states = {status.state for status in statuses}
    if states & {"running", "waiting"}:
        return
    outcome: Literal["FINISHED", "FAILED", ""] = ""
    if states & {"failed", "cancelled"}:
        outcome = "FAILED"
    elif states <= {"done", "stale"}:
        outcome = "FINISHED"
    last = [record for record in read_lines(journal) if "event" in record][-1:]
    if outcome and last and (last[0]["event"], last[0].get("status")) != ("end", outcome):
        Tracker.open(journal.parent).finish(outcome)
        _sync(pipeline)


def _sync(pipeline: PipelineSettings) -> None:
    try:
        sync(Layout(pipeline.out).out, tracking_uri(pipeline), pipeline.tracking.experiment)
    except LavicError as error:
        log.warning("the pipeline's own run is not in MLflow: %s", error)
