"""The pipeline's MLflow run, the parent of its stages' runs: opened by `lavic submit`, closed by `submit status`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

from lavic.config import flatten
from lavic.errors import LavicError
from lavic.launch.cli_args import typed
from lavic.launch.pipeline.dag import Layout
from lavic.launch.pipeline.settings import PipelineSettings
from lavic.launch.pipeline.step_status import Situation
from lavic.tracking.journal import JOURNAL_FILE, read_lines
from lavic.tracking.mlflow_sync import sync
from lavic.tracking.sync_record import read_record
from lavic.tracking.tracker import Tracker

log = logging.getLogger(__name__)


def tracking_uri(chosen: PipelineSettings) -> str:
    """MLflow's URI for the pipeline and its stages, in a form that may be written on a job's command line."""
    return chosen.tracking.recorded_uri(Layout(chosen.out).runs)


def open_parent(chosen: PipelineSettings) -> str:
    """The id of the pipeline's MLflow run, the same when it is submitted again; "" without MLflow or, with a warning,
    when it does not answer.
    """
    if not chosen.tracking.mlflow:
        return ""
    out = Layout(chosen.out).out
    tracker = Tracker.open(out, replace(chosen.tracking, mlflow=False, uri=tracking_uri(chosen)))  # no live sync
    tracker.start(out.name, flatten(chosen), {"lavic.pipeline": str(out)}, attended=False)
    tracker.detach()
    _send(chosen)
    record = read_record(out, chosen.tracking.resolve_uri(Layout(chosen.out).runs))
    return record.run_id if record else ""


def tracked(name: str, known: Mapping[str, object], chosen: PipelineSettings, parent: str) -> list[str]:
    """The flags that make a step's run a child of the pipeline's.

    Args:
        name: The step's.
        known: Its settings; only some commands report to MLflow.
        chosen: The pipeline.
        parent: Id of its run, or "".
    """
    if not chosen.tracking.mlflow or "tracking" not in known:
        return []
    mlflow = {"mlflow": True, "uri": tracking_uri(chosen), "experiment": chosen.tracking.experiment, "run": name}
    return list(typed({"tracking": {**mlflow, **({"parent_run": parent} if parent else {})}}))


def close_parent(chosen: PipelineSettings, statuses: Iterable[Situation]) -> None:
    """Ends the pipeline's run with its status, once no step runs or waits."""
    journal = Layout(chosen.out).out / JOURNAL_FILE
    if not chosen.tracking.mlflow or not journal.is_file():
        return
    states = {status.state for status in statuses}
    if states & {"running", "waiting"}:
        return
    status: Literal["FINISHED", "FAILED", ""] = ""
    if states & {"failed", "cancelled"}:
        status = "FAILED"
    elif states <= {"done", "stale"}:
        status = "FINISHED"
    last = [record for record in read_lines(journal) if "event" in record][-1:]
    if status and last and (last[0]["event"], last[0].get("status")) != ("end", status):
        Tracker.open(journal.parent).finish(status)
        _send(chosen)


def _send(chosen: PipelineSettings) -> None:
    try:
        sync(Layout(chosen.out).out, tracking_uri(chosen), chosen.tracking.experiment)
    except LavicError as error:
        log.warning("the pipeline's own run is not in MLflow: %s", error)
