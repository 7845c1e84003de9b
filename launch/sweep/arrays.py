"""The arrays of a sweep: one for stage 2, one for evaluation, whose tasks each wait for their own cell's stage 2."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lavic.errors import ConfigError, LaunchError
from lavic.launch.pipeline.dag import Layout
from lavic.launch.pipeline.mlflow_parent import tracking_settings
from lavic.launch.pipeline.settings import PipelineSettings
from lavic.launch.pipeline.step_digest import StepInputs
from lavic.launch.pipeline.step_status import last_error
from lavic.launch.slurm import client
from lavic.launch.slurm.sbatch_job import SbatchJob, array_job
from lavic.launch.sweep.cells import (
    SWEEP_STAGES,
    Array,
    Sweep,
    SweepStage,
    is_complete,
    plan_cells,
    task_args,
    write_settings,
)


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


def task_statuses(out: Path, sweep: Sweep, *, ask: bool = True) -> list[TaskStatus]:
    """The status of every cell, stage 2 first; without `ask`, a task without a result counts as ended.

    Raises:
        LaunchError: SLURM does not answer.
    """
    out = Layout(out).out
    arrays = (with_ids(sweep) if ask else sweep).arrays
    tasks = {(array.stage, index): array for array in arrays for index in array.indexes}
    unfinished: dict[str, list[str]] = defaultdict(list)
    for stage in SWEEP_STAGES:
        for name, index in sweep.cells.items():
            if (stage, index) in tasks and not is_complete(out, stage, name):
                array = tasks[stage, index]
                unfinished[array.owner].append(f"{array.id}_{index}")
    states: dict[str, client.JobState] = {}
    for owner, ids in unfinished.items() if ask else ():
        states |= client.task_states(ids, owner)
    rows = []
    for stage in SWEEP_STAGES:
        for name, index in sweep.cells.items():
            task = tasks.get((stage, index))
            job, log_file = (f"{task.id}_{index}", task.log(out, index)) if task else ("", "")
            rows.append(_status(stage, name, job, log_file, is_complete(out, stage, name), states.get(job)))
    return rows


def with_ids(sweep: Sweep) -> Sweep:
    """The sweep with the ids of arrays for which sbatch gave no answer, without those that are not in the queue.

    Raises:
        LaunchError: SLURM does not answer.
    """
    ids = client.job_ids_by_mark(array.mark for array in sweep.arrays if not array.id)
    known = [replace(array, id=array.id or ids.get(array.mark, "")) for array in sweep.arrays]
    return replace(sweep, arrays=[array for array in known if array.id])


def _status(
    stage: SweepStage, cell: str, job: str, log_file: str, complete: bool, seen: client.JobState | None
) -> TaskStatus:
    status = TaskStatus(stage=stage, cell=cell, state="done" if complete else "open", job=job, log=log_file)
    if complete or not job:
        return status
    if seen is not None and seen.active:
        return replace(status, state="waiting" if seen.state == "PENDING" else "running")
    why = last_error(Path(log_file)) or (seen.state if seen is not None else "its task has ended without its result")
    return replace(status, state="failed", why=why)


def with_all_cells(pipeline: PipelineSettings, sweep: Sweep) -> Sweep:
    """The sweep with all cells that the settings name; each new one gets the next index."""
    cells, parts = dict(sweep.cells), dict(sweep.parts)
    for cell in plan_cells(pipeline):
        cells.setdefault(cell.name, len(cells))
        parts[cell.name] = cell
    return replace(sweep, cells=cells, parts=parts)


def jobs_to_submit(
    pipeline: PipelineSettings,
    sweep: Sweep,
    statuses: Mapping[tuple[SweepStage, str], TaskStatus],
    stages: Collection[SweepStage],
    remade: Collection[tuple[SweepStage, str]],
) -> Iterator[tuple[SweepStage, list[int], str]]:
    """The arrays to submit: stage, indexes, and the array of stage 2 that they wait for; `new` for the one before.

    Cells that are remade start from scratch, whatever their status is.

    Raises:
        ConfigError: An evaluation has no stage 2.
    """
    cell_names = {cell.name for cell in plan_cells(pipeline)}

    def is_open(stage: SweepStage, name: str) -> bool:
        return (stage, name) in remade or statuses[stage, name].state in ("open", "failed")

    tuned: list[int] = []
    if "tune" in stages:
        tuned = [sweep.cells[name] for name in sweep.cells if name in cell_names and is_open("tune", name)]
        if tuned:
            yield "tune", tuned, ""
    if "evaluate" not in stages:
        return
    groups: dict[str, list[int]] = defaultdict(list)
    for name, index in sweep.cells.items():
        if name not in cell_names or not is_open("evaluate", name):
            continue
        tune_status = statuses["tune", name]
        if index in tuned:
            groups["new"].append(index)
        elif tune_status.state == "done":
            groups[""].append(index)
        elif tune_status.state in ("running", "waiting"):
            groups[tune_status.job.partition("_")[0]].append(index)
        else:
            raise ConfigError(f"evaluate of {name} needs its stage 2, which is not done: submit the stage tune too")
    for after, indexes in groups.items():
        yield "evaluate", indexes, after


def submit_arrays(
    pipeline: PipelineSettings,
    sweep: Sweep,
    inputs: Mapping[str, StepInputs],
    plan: Sequence[tuple[SweepStage, list[int], str]],
    after: Sequence[str],
    parent: str = "",
) -> Sweep:
    """Submits arrays. Each is registered before sbatch runs: if that gives no answer, the next call looks for it.

    Args:
        pipeline: Its settings.
        sweep: What is known of it, with all cells.
        inputs: `stage/cell` -> what it is made from.
        plan: From `jobs_to_submit`.
        after: Ids of the jobs of earlier stages that have not ended.
        parent: Id of the pipeline's MLflow run, or "".

    Raises:
        LaunchError: SLURM refuses or does not answer.
    """
    out = Layout(pipeline.out).out
    Layout(out).logs.mkdir(parents=True, exist_ok=True)
    names = {index: name for name, index in sweep.cells.items()}
    tune_id = ""
    for stage, indexes, waits_for in plan:
        tune_array = tune_id if waits_for == "new" else waits_for
        for index in indexes:  # not of tasks in the queue, which read theirs when they start
            cell = sweep.parts[names[index]]
            write_settings(pipeline, stage, cell, index, tracking_settings(pipeline, f"{stage}-{cell.name}", parent))
        array_inputs = {f"{stage}/{names[index]}": inputs[f"{stage}/{names[index]}"] for index in indexes}
        mark, owner = f"lavic-{uuid.uuid4().hex[:12]}", client.current_user()
        array = Array(stage=stage, id="", mark=mark, owner=owner, indexes=tuple(indexes))
        registered = replace(sweep, arrays=[*sweep.arrays, array], made={**sweep.made, **array_inputs})
        registered.write(out)
        job = stage_job(pipeline, stage, indexes)
        rerun = "arrays that were queued before it remain queued: run the same command again"
        try:
            id = client.submit([*_dependency(after, tune_array), *job.args(mark=mark)], job.env, mark=mark)
        except client.NoAnswer as error:
            raise LaunchError(f"{stage}: {error}; {rerun}, which looks for that array first") from None
        except LaunchError as error:
            sweep.write(out)
            raise LaunchError(f"{stage}: {error}; {rerun}") from None
        sweep = replace(registered, arrays=[*sweep.arrays, replace(array, id=id)])
        sweep.write(out)
        tune_id = id if stage == "tune" else tune_id
        waiting = f", each after its task of {tune_array}" if tune_array else ""
        print(f"{stage:<16}array {id} of {len(indexes)} tasks{waiting}", flush=True)
    return sweep


def stage_job(pipeline: PipelineSettings, stage: SweepStage, indexes: Sequence[int]) -> SbatchJob:
    """The array of a stage."""
    return array_job(stage, task_args(pipeline, stage), pipeline, indexes)


def _dependency(after: Sequence[str], corresponding: str) -> list[str]:
    """The option for an array that waits for jobs, and task by task for another array."""
    conditions = [f"afterok:{':'.join(after)}"] if after else []
    conditions += [f"aftercorr:{corresponding}"] if corresponding else []
    return [f"--dependency={','.join(conditions)}"] if conditions else []
