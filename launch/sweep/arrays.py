"""The arrays of a sweep: one for stage 2, one for evaluation, whose tasks each wait for their own cell's stage 2."""

from __future__ import annotations

import logging
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lavic.errors import ConfigError
from lavic.launch.pipeline.dag import Layout
from lavic.launch.pipeline.mlflow_parent import tracking_uri
from lavic.launch.pipeline.settings import PipelineSettings
from lavic.launch.pipeline.step_status import last_error
from lavic.launch.slurm import client
from lavic.launch.slurm.sbatch_job import SbatchJob, array_job
from lavic.launch.sweep.cells import (
    SWEEP_STAGES,
    Array,
    Cell,
    Sweep,
    SweepStage,
    is_complete,
    plan_cells,
    task_args,
    write_settings,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TaskStatus:
    """The status of one cell in one stage."""

    stage: SweepStage
    cell: str
    state: Literal["done", "running", "waiting", "failed", "open"]
    job: str = ""
    """Id of its task, `123_4`."""
    log: str = ""
    why: str = ""
    """Why it failed."""


def task_statuses(out: Path, sweep: Sweep) -> list[TaskStatus]:
    """The status of every cell, stage 2 first.

    Raises:
        LaunchError: SLURM does not answer.
    """
    out = Layout(out).out
    tasks = {
        (array.stage, index): (f"{array.id}_{index}", array.log.replace("%a", str(index)))
        for array in sweep.arrays
        for index in array.indexes
    }
    unfinished = [
        tasks[stage, index][0]
        for stage in SWEEP_STAGES
        for name, index in sweep.cells.items()
        if (stage, index) in tasks and not is_complete(out, stage, name)
    ]
    states = client.task_states(unfinished) if unfinished else {}
    rows = []
    for stage in SWEEP_STAGES:
        for name, index in sweep.cells.items():
            job, log_file = tasks.get((stage, index), ("", ""))
            rows.append(_status(stage, name, job, log_file, is_complete(out, stage, name), states.get(job)))
    return rows


def _status(
    stage: SweepStage, cell: str, job: str, log_file: str, complete: bool, seen: client.JobState | None
) -> TaskStatus:
    if complete:
        return TaskStatus(stage=stage, cell=cell, state="done", job=job, log=log_file)
    if not job:
        return TaskStatus(stage=stage, cell=cell, state="open")
    if seen is not None and seen.active:
        state: Literal["running", "waiting"] = "waiting" if seen.state == "PENDING" else "running"
        return TaskStatus(stage=stage, cell=cell, state=state, job=job, log=log_file)
    why = last_error(Path(log_file)) or (seen.state if seen is not None else "its task has ended without its result")
    return TaskStatus(stage=stage, cell=cell, state="failed", job=job, log=log_file, why=why)


def prepare(pipeline: PipelineSettings, sweep: Sweep, parent: str) -> tuple[Sweep, dict[str, str]]:
    """Numbers the cells and writes the settings of their tasks.

    Args:
        pipeline: Its settings.
        sweep: What is known of it.
        parent: Id of the pipeline's MLflow run, or "".

    Returns:
        The sweep with all cells, and `stage/cell` -> digest of the settings.
    """
    cells, parts, digests = dict(sweep.cells), dict(sweep.parts), {}
    for cell in plan_cells(pipeline):
        index = cells.setdefault(cell.name, len(cells))
        parts[cell.name] = cell
        for stage in SWEEP_STAGES:
            tracking = _tracking(pipeline, stage, cell, parent)
            digests[f"{stage}/{cell.name}"] = write_settings(pipeline, stage, cell, index, tracking)
    return replace(sweep, cells=cells, parts=parts), digests


def _tracking(pipeline: PipelineSettings, stage: SweepStage, cell: Cell, parent: str) -> dict[str, Any]:
    if not pipeline.tracking.mlflow:
        return {}
    values = {"mlflow": True, "uri": tracking_uri(pipeline), "experiment": pipeline.tracking.experiment}
    return {
        "tracking": {**values, "run": f"{stage}-{cell.name}", **({"parent_run": parent} if parent else {})},
    }


def jobs_to_submit(
    pipeline: PipelineSettings, sweep: Sweep, digests: Mapping[str, str], stages: Sequence[SweepStage]
) -> Iterator[tuple[SweepStage, list[int], str]]:
    """The arrays to submit: stage, indexes, and the array of stage 2 that they wait for; `new` for the one before.

    Raises:
        LaunchError: SLURM does not answer.
    """
    wanted = {cell.name for cell in plan_cells(pipeline)}
    statuses = {(row.stage, row.cell): row for row in task_statuses(pipeline.out, sweep)}
    for key, digest in digests.items():
        stage, _, name = key.partition("/")
        is_done = statuses[stage, name].state == "done"  # type: ignore[index]
        if is_done and sweep.made.get(key, digest) != digest:
            log.warning("%s of %s was made with other settings: to make it again, remove its folder", stage, name)
    tuned: list[int] = []
    if "tune" in stages:
        tuned = [sweep.cells[name] for name in sweep.cells if name in wanted and _is_open(statuses["tune", name])]
        if tuned:
            yield "tune", tuned, ""
    if "evaluate" not in stages:
        return
    groups: dict[str, list[int]] = defaultdict(list)
    for name, index in sweep.cells.items():
        if name not in wanted or not _is_open(statuses["evaluate", name]):
            continue
        before = statuses["tune", name]
        if index in tuned:
            groups["new"].append(index)
        elif before.state == "done":
            groups[""].append(index)
        elif before.state in ("running", "waiting"):
            groups[before.job.partition("_")[0]].append(index)
        else:
            raise ConfigError(f"evaluate of {name} needs its stage 2, which is not done: submit the stage tune too")
    for after, indexes in groups.items():
        yield "evaluate", indexes, after


def _is_open(status: TaskStatus) -> bool:
    return status.state in ("open", "failed")


def submit_arrays(
    pipeline: PipelineSettings,
    sweep: Sweep,
    digests: Mapping[str, str],
    stages: Sequence[SweepStage],
    after: Sequence[str],
) -> Sweep:
    """Submits what is neither done nor in the queue; the same call again submits the rest.

    Args:
        pipeline: Its settings.
        sweep: From `prepare`.
        digests: From `prepare`.
        stages: The stages to submit.
        after: Ids of the jobs of earlier stages that have not ended.

    Raises:
        LaunchError: SLURM refuses or does not answer.
    """
    out = Layout(pipeline.out).out
    Layout(out).logs.mkdir(parents=True, exist_ok=True)
    names = {index: name for name, index in sweep.cells.items()}
    sweep.write(out)
    tune_id = ""
    for stage, indexes, waits_for in list(jobs_to_submit(pipeline, sweep, digests, stages)):
        job = stage_job(pipeline, stage, indexes)
        id = _submit(job, after, tune_id if waits_for == "new" else waits_for)
        if stage == "tune":
            tune_id = id
        array = Array(stage=stage, id=id, indexes=tuple(indexes), log=str(job.logs / f"{stage}-{id}_%a.log"))
        made = {f"{stage}/{names[index]}": digests[f"{stage}/{names[index]}"] for index in indexes}
        sweep = replace(sweep, arrays=[*sweep.arrays, array], made={**sweep.made, **made})
        sweep.write(out)
        waiting = f", each after its task of {tune_id if waits_for == 'new' else waits_for}" if waits_for else ""
        print(f"{stage:<16}array {id} of {len(indexes)} tasks{waiting}", flush=True)
    return sweep


def stage_job(pipeline: PipelineSettings, stage: SweepStage, indexes: Sequence[int]) -> SbatchJob:
    """The array of a stage."""
    return array_job(stage, task_args(pipeline, stage), pipeline, indexes)


def _submit(job: SbatchJob, after: Sequence[str], corresponding: str) -> str:
    kinds = [f"afterok:{':'.join(after)}"] if after else []
    kinds += [f"aftercorr:{corresponding}"] if corresponding else []
    dependency = [f"--dependency={','.join(kinds)}"] if kinds else []
    mark = f"lavic-{uuid.uuid4().hex[:12]}"
    args = job.args(mark=mark)
    return client.submit([*dependency, *args], job.env, mark=mark)
