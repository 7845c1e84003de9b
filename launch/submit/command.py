"""`lavic submit`: the pipeline as SLURM jobs that depend on each other."""

from __future__ import annotations

import logging
import shlex
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lavic.config import dump, load, parse
from lavic.errors import ConfigError, LaunchError, LavicError
from lavic.launch.pipeline.dag import Layout, Step, plan_steps, select_steps
from lavic.launch.pipeline.job_registry import Job, locked, read_jobs, write_jobs, write_states
from lavic.launch.pipeline.mlflow_parent import open_parent, tracking_args
from lavic.launch.pipeline.pipeline_status import PipelineStatus, pipeline_status, resolve_settings
from lavic.launch.pipeline.settings import (
    PipelineSettings,
    Stage,
    field_of,
    stage_of,
    stage_settings,
    with_absolute_paths,
)
from lavic.launch.pipeline.stale_results import move_to_stale, updates_in_place
from lavic.launch.pipeline.step_digest import (
    StepRecord,
    matching_files,
    read_records,
    reads_result_of,
    write_records,
)
from lavic.launch.pipeline.step_status import StepStatus, refresh_jobs
from lavic.launch.slurm import client
from lavic.launch.slurm.sbatch_job import SbatchJob, status_job, step_job
from lavic.launch.sweep.cells import is_sweep, missing_files
from lavic.launch.sweep.submission import submit_sweep, sweep_text, swept_stages, without_sweep_stages
from lavic.storage.atomic import atomic_write

DESCRIPTION = """Submits the pipeline as SLURM jobs that depend on each other: crawl, verify, describe, distill, embed,
tune-retriever, retrieve (both where `stages` names them), tune, evaluate.

One yaml file has the stages, their settings and the resources of their jobs; the pipeline fills in the folders between
them, all below OUT. Every setting of every stage is checked before the first job is queued. The same command again
submits the steps that are neither done nor have a job. A step is done when its result is complete and was made with
these settings and inputs. A result that was made with others is stale: it is moved to OUT/stale and rebuilt, and so
is everything that depends on it; --keep accepts it as it is.

  lavic submit --config pipeline-7b --out /shared/amazon --dry-run
  lavic submit --config pipeline-7b --out /shared/amazon
  lavic submit status /shared/amazon --watch
  lavic submit logs /shared/amazon distill -f
  lavic submit cancel /shared/amazon
  lavic submit --config reproduce-lavic --out /shared/lavic
  lavic submit table /shared/lavic

With `sweep`, tune and evaluate run once for each category, candidate list and seed, as SLURM arrays; `table` puts their
results into one table.

A stage that fails cancels the later ones; `status` shows why. `slurm/env.sh` has the settings of your site."""

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    args = list(argv or ())
    if args[:1] == ["table"]:
        from lavic.launch.sweep import table

        return table.main(args[1:])
    if args[:1] and args[0] in ("status", "cancel", "logs"):
        from lavic.launch.submit import cancel, logs, status

        return {"status": status, "cancel": cancel, "logs": logs}[args[0]].main(args[1:])
    pipeline = with_absolute_paths(parse(PipelineSettings, args, command="submit", description=DESCRIPTION))
    full, swept = pipeline, swept_stages(pipeline)
    if is_sweep(pipeline):
        pipeline = without_sweep_stages(pipeline)
    steps = plan_steps(pipeline)
    selected = select_steps(steps, pipeline) if pipeline.only or not full.only else []
    settings = {step.name: resolve_settings(step, pipeline) for step in selected}
    if pipeline.dry_run:
        from lavic.launch.pipeline.dry_run import dry_run_text

        print(dry_run_text(pipeline, selected, settings))
        if missing := missing_inputs(selected, {}):
            print("\n== missing inputs: nothing is submitted until they exist")
            print("\n".join(f"  {line}" for line in missing))
        if swept:
            print(f"\n{sweep_text(full, swept)}")
            print("\n".join(f"  {line}" for line in missing_files(full, swept)))
        return 0
    if missing := missing_files(full, swept):
        raise ConfigError(missing[0] + (f"; {len(missing) - 1} more" if len(missing) > 1 else ""))
    out = Layout(pipeline.out).out
    with locked(out):
        if selected:
            _submit(pipeline, steps, selected, settings)
        if swept:
            submit_sweep(full, steps, swept)
    if pipeline.wait:
        from lavic.launch.submit.status import show

        return show(out, watch=True)
    return 0


def _submit(
    pipeline: PipelineSettings, steps: Sequence[Step], selected: Sequence[Step], settings: Mapping[str, Any]
) -> None:
    layout = Layout(pipeline.out)
    jobs = refresh_jobs(read_jobs(layout.out))
    current = pipeline_status(layout.out, steps, settings, jobs, read_records(layout.out))
    write_states(layout.out, jobs, current.used)
    records = dict(current.records)
    to_submit, from_scratch = _steps_to_submit(pipeline, selected, current, settings)
    if missing := missing_inputs(to_submit, current.steps):
        raise ConfigError("; ".join(missing))
    for step in to_submit:
        try:
            if wait_reason := client.test_submit(step_job(step, pipeline, settings[step.name]).args()):
                log.warning("%s cannot start now, it will wait: %s", step.name, wait_reason)
        except LaunchError as error:
            raise LaunchError(f"{step.name}: {error}") from None
    layout.logs.mkdir(parents=True, exist_ok=True)
    not_submitted = {step.stage for step in selected} - {step.stage for step in to_submit}
    if to_submit or not (layout.out / "pipeline.yaml").is_file():
        recorded = _recorded_settings(pipeline, layout, not_submitted, records)
        atomic_write(layout.out / "pipeline.yaml", dump(recorded, command="submit"))
    parent = open_parent(pipeline) if to_submit else ""
    new_names = {step.name for step in to_submit}
    for step in selected:
        name, inputs, status = step.name, current.inputs[step.name], current.steps[step.name]
        differences = current.differences.get(name, ())
        if step not in to_submit:
            # a result that was made by hand has no record: it is accepted, and compared from now on
            record = records.get(name, StepRecord(made=inputs))
            accepted = differences and status.state in ("done", "stale")
            records[name] = replace(record, accepted=inputs) if accepted else record
            print(f"{name:<16}{_state_text(status, differences)}", flush=True)
            continue
        had_job = name in jobs
        moved = move_to_stale(step, layout) if name in from_scratch else None
        results = {other: digest for other, digest in inputs.results.items() if other not in new_names}
        records[name] = StepRecord(made=replace(inputs, results=results))
        write_records(layout.out, records)
        sbatch_job = step_job(step, pipeline, settings[name], tracking_args(name, settings[name], pipeline, parent))
        job = _submit_job(sbatch_job, _dependencies(step, steps, current.steps, jobs, to_submit), jobs, layout.out)
        dependencies = f", after {' and '.join(job.after)}" if job.after else ""
        previous_state = f" (was {status.state}: {status.why})" if had_job or status.state == "stale" else ""
        moved_note = f"; the old result is now in {moved}" if moved else ""
        print(f"{name:<16}job {job.id}{dependencies}{previous_state}{moved_note}", flush=True)
    write_records(layout.out, records)
    write_jobs(layout.out, jobs)
    if not to_submit:
        print(f"{layout.out}: nothing to submit")
    elif pipeline.tracking.mlflow:
        _submit_job(status_job(pipeline), [step.name for step in to_submit], jobs, layout.out, kind="afterany")
    print(f"next: lavic submit status {shlex.quote(str(layout.out))}")


def _steps_to_submit(
    pipeline: PipelineSettings, selected: Sequence[Step], current: PipelineStatus, settings: Mapping[str, Any]
) -> tuple[list[Step], set[str]]:
    """The steps to submit, and the names of those that start from scratch: their old results are moved away.

    Raises:
        ConfigError: A step that would start from scratch is running or waiting.
    """
    to_submit, from_scratch, updated = [], set[str](), set[str]()
    for step in selected:
        status = current.steps[step.name]
        changed_inputs = [name for name in from_scratch if reads_result_of(step, name)]
        differences = current.differences.get(step.name, ())
        inputs_in_progress = any(
            reads_result_of(step, name) and other.state in ("running", "waiting")
            for name, other in current.steps.items()
        )
        is_stale = status.state == "stale" and not pipeline.keep and bool(differences or inputs_in_progress)
        if (
            differences
            and status.state != "done"
            and not pipeline.keep
            and updates_in_place(step, settings[step.name], differences)
        ):
            # steps that train on the set run again if it changes, which is not known yet; steps that check it are cheap
            is_stale = False
            if status.state == "stale":
                updated.add(step.name)
            differences = ()
        elif (
            step.stage in ("verify", "describe")
            and status.state in ("done", "stale")
            and (updated | from_scratch) & {*step.needs}
        ):
            updated.add(step.name)
        unfinished = status.state in ("open", "failed", "cancelled") and differences
        if step.stage in pipeline.force or changed_inputs or is_stale or unfinished:
            from_scratch.add(step.name)
        if status.state in ("running", "waiting"):
            _check_active(pipeline, status, changed_inputs, step.name in from_scratch)
            if changes := current.differences.get(step.name):
                log.warning(
                    "%s continues as job %s, which was submitted before a change (%s): cancel it and submit again to "
                    "apply the change",
                    *(step.name, status.job.id if status.job else "", "; ".join(changes)),
                )
        elif step.name in from_scratch or step.name in updated or not status.satisfied:
            to_submit.append(step)
    return to_submit, from_scratch


def _check_active(
    pipeline: PipelineSettings, status: StepStatus, changed_inputs: Sequence[str], from_scratch: bool
) -> None:
    """Raises ConfigError where a step that has a job would have to start from scratch."""
    if from_scratch:
        name, job = status.step.name, status.job.id if status.job else ""
        reason = f"it reads {' and '.join(changed_inputs)}" if changed_inputs else "--force names it"
        raise ConfigError(
            f"{name} is {status.state} (job {job}) and would be rebuilt, since {reason}: "
            f"cancel it with `lavic submit cancel {shlex.quote(str(pipeline.out))} {name}`, or wait until it has ended"
        )


def _recorded_settings(
    pipeline: PipelineSettings, layout: Layout, not_submitted: Collection[Stage], records: Mapping[str, StepRecord]
) -> PipelineSettings:
    """The settings for pipeline.yaml; stages that are not submitted now keep the settings that they ran with."""
    pipeline = replace(pipeline, only=(), from_=None, force=(), keep=False, wait=False)
    try:
        recorded_pipeline = load(PipelineSettings, layout.out / "pipeline.yaml")
    except (LavicError, OSError):
        return pipeline
    recorded = {stage_of(name) for name in records}
    stages = [stage for stage in not_submitted if stage in recorded]
    kept_settings: dict[str, Any] = {field_of(stage): stage_settings(recorded_pipeline, stage) for stage in stages}
    return replace(pipeline, **kept_settings)


def missing_inputs(to_submit: Sequence[Step], statuses: Mapping[str, StepStatus]) -> list[str]:
    """Files and results of other steps that steps need and that are missing: a line for each."""
    names = {step.name for step in to_submit}
    lines = [
        f"{step.name} reads {file}: no such file"
        for step in to_submit
        for file in step.inputs
        if not matching_files(file)
    ]
    for step in to_submit:
        for need in step.needs:
            if need not in names and need in statuses and not statuses[need].satisfied:
                output = statuses[need].step.output
                lines.append(f"{step.name} needs {need}, which is not done ({output}): submit that stage too")
    return lines


def _dependencies(
    step: Step,
    steps: Sequence[Step],
    statuses: Mapping[str, StepStatus],
    jobs: Mapping[str, Job],
    to_submit: Sequence[Step],
) -> list[str]:
    """The nearest steps that it needs, directly or not, and that have a job or get one."""
    by_name = {other.name: other for other in steps}
    names: list[str] = []
    for need in step.needs:
        if by_name[need] in to_submit or (need in jobs and statuses[need].state in ("running", "waiting")):
            names.append(need)
        else:
            names += _dependencies(by_name[need], steps, statuses, jobs, to_submit)
    return list(dict.fromkeys(names))


def _submit_job(
    sbatch_job: SbatchJob,
    after: Sequence[str],
    jobs: dict[str, Job],
    out: Path,
    kind: Literal["afterok", "afterany"] = "afterok",
) -> Job:
    """Submits a job. It is registered before sbatch runs: if sbatch gives no answer, the next call looks for it."""
    name, previous = sbatch_job.name, jobs.get(sbatch_job.name)
    job = Job(
        id="",
        mark=f"lavic-{uuid.uuid4().hex[:12]}",
        owner=client.current_user(),
        after=tuple(after),
        log=str(sbatch_job.log("unknown")),
        submitted=round(time.time(), 3),
    )
    jobs[name] = job
    write_jobs(out, jobs)
    rerun = "jobs that were queued before it remain queued: run the same command again"
    try:
        args = sbatch_job.args([jobs[other].id for other in after], kind, job.mark)
        id = client.submit(args, sbatch_job.env, mark=job.mark)
    except client.NoAnswer as error:
        raise LaunchError(f"{name}: {error}; {rerun}, which looks for that job first") from None
    except LaunchError as error:
        del jobs[name]
        write_jobs(out, jobs | ({name: previous} if previous else {}))
        raise LaunchError(f"{name}: {error}; {rerun}") from None
    jobs[name] = replace(job, id=id, log=str(sbatch_job.log(id)))
    write_jobs(out, jobs)
    return jobs[name]


def _state_text(status: StepStatus, differences: Sequence[str]) -> str:
    if differences and status.state == "stale":
        return f"done, kept as it is ({'; '.join(differences)})"
    job = f", job {status.job.id}" if status.job and status.state not in ("done", "stale") else ""
    return f"{status.state}{job}"
