"""The pipeline's own MLflow run, under which its stages' runs stand: opened by `lavic submit`, closed by its status."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

from lavic.config.loader import flatten
from lavic.errors import LavicError
from lavic.launch.cli_args import typed
from lavic.launch.pipeline.dag import Layout
from lavic.launch.pipeline.settings import PipelineSettings
from lavic.launch.pipeline.step_status import Situation
from lavic.tracking.journal import FILE, read_lines
from lavic.tracking.sync_record import read_sent
from lavic.tracking.tracker import Tracker, sync

log = logging.getLogger(__name__)


def address(chosen: PipelineSettings) -> str:
    """MLflow's address, for the pipeline and all its stages, as it may stand on a job's command line."""
    return chosen.tracking.reference(Layout(chosen.out).runs)


def open_parent(chosen: PipelineSettings) -> str:
    """The id of the pipeline's MLflow run; "" where MLflow is not asked for or does not answer, and that is said.

    A pipeline that is submitted again goes on with its run.
    """
    if not chosen.tracking.mlflow:
        return ""
    out = Layout(chosen.out).out
    here = replace(chosen.tracking, mlflow=False, uri=address(chosen))  # sent here, not by a process beside this one
    tracker = Tracker.open(out, here)
    tracker.start(out.name, flatten(chosen), {"lavic.pipeline": str(out)}, attended=False)
    tracker.leave()
    _send(chosen)
    sent = read_sent(out, chosen.tracking.address(Layout(chosen.out).runs))
    return sent.run_id if sent else ""


def tracked(name: str, known: Mapping[str, object], chosen: PipelineSettings, parent: str) -> list[str]:
    """The words that put a step's run below the pipeline's.

    Args:
        name: The step's.
        known: Its settings; only some commands report to MLflow.
        chosen: The pipeline.
        parent: Id of its run, or "".
    """
    if not chosen.tracking.mlflow or "tracking" not in known:
        return []
    mlflow = {"mlflow": True, "uri": address(chosen), "experiment": chosen.tracking.experiment, "run": name}
    return list(typed({"tracking": {**mlflow, **({"parent_run": parent} if parent else {})}}))


def close_parent(chosen: PipelineSettings, found: Iterable[Situation]) -> None:
    """Ends the pipeline's run, once nothing of the pipeline is under way, with what came of it."""
    journal = Layout(chosen.out).out / FILE
    if not chosen.tracking.mlflow or not journal.is_file():
        return
    states = {one.state for one in found}
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
        sync(Layout(chosen.out).out, address(chosen), chosen.tracking.experiment)
    except LavicError as error:
        log.warning("the pipeline's own run is not in MLflow: %s", error)
