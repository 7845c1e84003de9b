"""Submits a sweep: stage 2 and evaluation as arrays with a task for each cell, after the stages that run once."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from lavic.config import dump
from lavic.data.manifest import NAME
from lavic.errors import ConfigError
from lavic.launch.pipeline.dag import Layout, Step
from lavic.launch.pipeline.digest_cache import DigestCache
from lavic.launch.pipeline.job_registry import read_jobs
from lavic.launch.pipeline.mlflow_parent import open_parent
from lavic.launch.pipeline.pipeline_status import is_complete
from lavic.launch.pipeline.settings import RETRIEVAL, PipelineSettings
from lavic.launch.pipeline.step_status import refresh_jobs
from lavic.launch.sweep.arrays import jobs_to_submit, stage_job, submit_arrays, task_statuses, with_all_cells, with_ids
from lavic.launch.sweep.cells import (
    SWEEP_STAGES,
    Sweep,
    SweepStage,
    is_sweep,
    plan_cells,
    resolve_cell,
    wanted_inputs,
)
from lavic.launch.sweep.remade_cells import move_remade, remade_cells, with_kept
from lavic.storage.atomic import atomic_write


def submit_sweep(pipeline: PipelineSettings, steps: Sequence[Step], stages: Sequence[SweepStage]) -> None:
    """Submits the arrays of a sweep, which wait for the jobs of the other stages."""
    layout = Layout(pipeline.out)
    jobs = refresh_jobs(read_jobs(layout.out))
    active = [job.id for name, job in jobs.items() if job.seen.active and name != "status"]
    if not active and not is_complete(next(step for step in steps if step.stage == "embed"), DigestCache(layout.out)):
        raise ConfigError(f"a sweep needs the item store, which is not done ({layout.store}): submit its stages too")
    shared = without_sweep_stages(pipeline)
    sweep = with_all_cells(pipeline, with_ids(Sweep.read(layout.out)))
    if not (layout.out / "pipeline.yaml").is_file():
        atomic_write(layout.out / "pipeline.yaml", dump(shared, command="submit"))
    statuses = {(row.stage, row.cell): row for row in task_statuses(layout.out, sweep)}
    cache = DigestCache(layout.out)
    store = "" if active else cache.digest(layout.store / NAME)
    inputs = {
        f"{stage}/{cell.name}": wanted_inputs(pipeline, stage, cell, cache, {"embed": store} if store else {})
        for cell in plan_cells(pipeline)
        for stage in SWEEP_STAGES
    }
    cache.save()
    done_keys = [
        key for row in statuses.values() if row.state == "done" and (key := f"{row.stage}/{row.cell}") in inputs
    ]
    sweep = with_kept(sweep, inputs, done_keys, keep=pipeline.keep)
    remade = remade_cells(pipeline, sweep, inputs, stages, statuses)
    plan = list(jobs_to_submit(pipeline, sweep, statuses, stages, remade))
    move_remade(pipeline, remade)
    sweep.write(layout.out)
    if plan:
        submit_arrays(pipeline, sweep, inputs, plan, active, open_parent(shared))
    else:
        print(f"{layout.out}: no cell to submit")
    print(f"then: lavic submit table {shlex.quote(str(layout.out))}")


def swept_stages(pipeline: PipelineSettings) -> list[SweepStage]:
    """The stages to submit as arrays.

    Raises:
        ConfigError: A setting does not go with a sweep.
    """
    if not is_sweep(pipeline):
        return []
    if retrieval := [stage for stage in RETRIEVAL if stage in pipeline.stages]:
        raise ConfigError(
            f"stages: {retrieval[0]} does not go with a sweep, whose cells read the lists of the conversations: "
            "make them first with `lavic retrieve`"
        )
    for stage in SWEEP_STAGES:
        if stage in pipeline.force and stage not in pipeline.stages:
            raise ConfigError(f"--force {stage}: not in this pipeline's stages ({', '.join(pipeline.stages)})")
    if pipeline.from_ in SWEEP_STAGES:
        raise ConfigError(f"--from {pipeline.from_}: use --only, which a sweep's stages know")
    requested = pipeline.only or pipeline.stages
    stages = [stage for stage in SWEEP_STAGES if stage in pipeline.stages and stage in requested]
    for cell in plan_cells(pipeline):
        for stage in stages:
            resolve_cell(pipeline, stage, cell)
    return stages


def without_sweep_stages(pipeline: PipelineSettings) -> PipelineSettings:
    """The pipeline with the stages that run once."""
    stages, only, force = (
        tuple(stage for stage in names if stage not in SWEEP_STAGES)
        for names in (pipeline.stages, pipeline.only, pipeline.force)
    )
    return replace(pipeline, stages=stages, only=only, force=force)


def sweep_text(pipeline: PipelineSettings, stages: Sequence[SweepStage]) -> str:
    """The arrays that a dry run would submit."""
    cells = plan_cells(pipeline)
    blocks = [f"== sweep of {len(cells)} cells: {', '.join(cell.name for cell in cells)}"]
    for stage in stages:
        job = stage_job(pipeline, stage, range(len(cells)))
        blocks.append(f"== {stage}, a task for each cell\n  sbatch {shlex.join(job.args())}")
    return "\n\n".join(blocks)
