"""`lavic submit status`: state, job, progress and run time of each step of a pipeline, and why a step failed."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from lavic.config import Positional, load, parse, settings
from lavic.errors import ConfigError, LaunchError, LavicError
from lavic.launch.pipeline.dag import Layout, Step, plan_steps
from lavic.launch.pipeline.job_registry import Job, read_jobs, write_states
from lavic.launch.pipeline.mlflow_parent import close_parent
from lavic.launch.pipeline.pipeline_status import pipeline_status, resolve_settings
from lavic.launch.pipeline.progress import progress, remaining_seconds
from lavic.launch.pipeline.settings import PipelineSettings
from lavic.launch.pipeline.step_digest import read_records
from lavic.launch.pipeline.step_status import StepStatus, exit_code, last_lines, refresh_jobs
from lavic.launch.sweep.arrays import TaskStatus, task_statuses
from lavic.launch.sweep.cells import SWEEP_STAGES, Sweep

DESCRIPTION = """Shows the status of a pipeline that `lavic submit` started: state, job, progress, run time and log of
each step, and why a step failed, was cancelled or is stale.

A step is done when its result is complete in its folder, whatever SLURM reports of its job. It is stale when the result
was made with other settings or inputs than pipeline.yaml and the input files have now. Every user who can read the
folder can ask. Exit code 1 if a step failed or was cancelled.

  lavic submit status /shared/amazon
  lavic submit status /shared/amazon --watch
  lavic submit status /shared/amazon --json"""

POLL_S = 15.0
"""Seconds between two queries of running jobs."""
_LOG_LINES = 5
"""Lines shown of the log of a failed step."""

log = logging.getLogger(__name__)


@settings
class Settings:
    """Which pipeline."""

    out: Annotated[Path, Positional]
    """The pipeline's folder."""
    json: bool = False
    """Print one JSON object per step."""
    watch: bool = False
    """Keep running, and print the status again when it has changed, until every job has ended."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is shown of a step."""

    status: StepStatus
    progress: str
    """How far it is."""
    remaining_s: float | None
    """Seconds that it will still take at its current speed; None where that is not known."""

    def as_dict(self) -> dict[str, Any]:
        """The row for `--json`."""
        status, job = self.status, self.status.job
        has_ended_badly = job is not None and status.state in ("failed", "cancelled")
        return {
            "step": status.step.name,
            "state": status.state,
            "why": status.why,
            "job": job.id if job else None,
            "slurm": job.seen.state if job else None,
            "progress": self.progress,
            "elapsed": job.seen.elapsed or None if job else None,
            "limit": job.seen.limit or None if job else None,
            "start": job.seen.start or None if job else None,
            "remaining_s": None if self.remaining_s is None else round(self.remaining_s),
            "exit_code": exit_code(job) if job else None,
            "place": str(status.step.output),
            "log": job.log if job else None,
            "last_lines": last_lines(Path(job.log), _LOG_LINES) if job and has_ended_badly else [],
        }


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns 1 where a step failed or was cancelled."""
    chosen = parse(Settings, argv, command="submit status", description=DESCRIPTION)
    return show(chosen.out, as_json=chosen.json, watch=chosen.watch)


def show(out: Path, *, as_json: bool = False, watch: bool = False) -> int:
    """Prints the status of a pipeline; returns 1 where a step failed or was cancelled.

    With `as_json` it is one JSON object per step instead of a table; with `watch` it is printed again at every change,
    until every job has ended.
    """
    printed = ""
    while True:
        rows, tasks = collect_rows(out), sweep_tasks(out)
        lines = [json.dumps(row.as_dict()) for row in rows] if as_json else [table(rows)]
        lines += (
            [json.dumps({"step": f"{task.stage}-{task.cell}", **asdict(task)}) for task in tasks]
            if as_json
            else sweep_lines(tasks)
        )
        text = "\n".join(lines)
        if text != printed:
            if printed and not as_json:
                # a terminal shows the current status only, a log every change
                print("\033[H\033[2J" if sys.stdout.isatty() else f"\n{time.strftime('%F %T')}")
            print(text, flush=True)
            printed = text
        states = {row.status.state for row in rows} | {task.state for task in tasks}
        if not watch or not states & {"running", "waiting"}:
            return int(bool(states & {"failed", "cancelled"}))
        time.sleep(POLL_S)


def sweep_tasks(out: Path, *, ask: bool = True) -> list[TaskStatus]:
    """The status of a sweep's cells; none without a sweep. Without `ask`, SLURM is not asked which still run."""
    sweep = Sweep.read(Layout(out).out)
    return task_statuses(out, sweep, ask=ask) if sweep.arrays else []


def select_tasks(tasks: Sequence[TaskStatus], names: Sequence[str]) -> list[TaskStatus]:
    """The tasks that are given by stage, by cell, or by both as `tune-all_beauty-st-0`; all where none is given."""
    return [task for task in tasks if not names or {task.stage, task.cell, f"{task.stage}-{task.cell}"} & set(names)]


def sweep_lines(tasks: Sequence[TaskStatus]) -> list[str]:
    """The status of a sweep's cells as text: counts by stage, and each that is neither done nor waiting."""
    lines = []
    for stage in SWEEP_STAGES:
        counts = Counter(task.state for task in tasks if task.stage == stage)
        if counts:
            lines.append(f"{stage}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    for task in tasks:
        if task.state in ("running", "failed"):
            why = f": {task.why}" if task.why else ""
            lines.append(f"  {task.stage} {task.cell}  {task.state}  {task.job}  {task.log}{why}")
    return lines


def read_pipeline(out: Path) -> tuple[PipelineSettings, list[Step]]:
    """The settings of the pipeline in a folder, and its steps.

    Raises:
        ConfigError: There is none.
    """
    file = out / "pipeline.yaml"
    if not file.is_file():
        raise ConfigError(f"{out}: no pipeline.yaml; give the --out of a `lavic submit`")
    # the folder may have been moved since
    pipeline = replace(load(PipelineSettings, file), out=out)
    return pipeline, plan_steps(pipeline, find_configs=False)


def flag_trailing_args(argv: Sequence[str], flag: str) -> list[str]:
    """The arguments `OUT NAME ...` as `OUT --flag NAME ...`."""
    count = next((number for number, arg in enumerate(argv) if arg.startswith("-")), len(argv))
    return [*argv[:1], *argv[count:], flag, *argv[1:count]] if count > 1 else [*argv]


def select_names(steps: Sequence[Step], names: Sequence[str]) -> list[str]:
    """The names of the steps that are given by their own name or their stage's; of all where none is given.

    Raises:
        ConfigError: A name is not in the pipeline.
    """
    known = {name for step in steps for name in (step.name, step.stage)}
    for name in names:
        if name not in known:
            raise ConfigError(f"{name}: no step or stage of this pipeline ({', '.join(step.name for step in steps)})")
    return [step.name for step in steps if not names or step.name in names or step.stage in names]


def last_known_jobs(out: Path) -> dict[str, Job]:
    """A pipeline's jobs with their states now, or their last known ones where SLURM does not answer."""
    jobs = read_jobs(out)
    try:
        return refresh_jobs(jobs)
    except LaunchError as error:
        log.warning("last known states are used: %s", error)
        return {name: job for name, job in jobs.items() if job.id}


def collect_rows(out: Path) -> list[Row]:
    """The status of every step of the pipeline in `out`. Takes no lock: every user who can read the folder may ask.

    Raises:
        ConfigError: There is no pipeline.
    """
    pipeline, steps = read_pipeline(out)
    out = Layout(out).out
    jobs = last_known_jobs(out)
    current = pipeline_status(out, steps, _resolvable_settings(steps, pipeline), jobs, read_records(out))
    write_states(out, jobs, current.used)
    statuses = [status for status in current.steps.values() if status.step.selected]
    with contextlib.suppress(OSError):  # another user, who may not write here
        close_parent(pipeline, statuses)
    rows = []
    for status in statuses:
        photos = getattr(pipeline.photos, status.step.name.rpartition("-")[2], None)
        is_running = status.state == "running"
        remaining_s = remaining_seconds(status.step, photos.expected if photos else None) if is_running else None
        rows.append(Row(status=status, progress=progress(status.step), remaining_s=remaining_s))
    return rows


def _resolvable_settings(steps: Sequence[Step], pipeline: PipelineSettings) -> dict[str, Any]:
    """The settings of the steps; without those of a step whose yaml file is gone, which is then not compared."""
    resolved = {}
    for step in steps:
        try:
            resolved[step.name] = resolve_settings(step, pipeline)
        except LavicError as error:
            if step.selected:
                log.warning("not compared with its settings: %s", error)
    return resolved


def table(rows: Sequence[Row]) -> str:
    """The rows as a table, then why steps failed or are stale, then the ends of the logs of failed steps."""
    cells = [("step", "state", "job", "time", "progress", "log")]
    for row in rows:
        status, job = row.status, row.status.job
        cells.append(
            (status.step.name, status.state, job.id if job else "", _time(row), row.progress, job.log if job else "")
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]) - 1)]
    lines = [
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in cells
    ]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        status = row.status
        if status.why and status.state != "done" and status.why != "Dependency":
            code = exit_code(status.job) if status.job and status.state == "failed" else None
            suffix = f" (exit code {code})" if code else ""
            reasons.setdefault(f"{status.state}{suffix}: {status.why}", []).append(status.step.name)
    explained = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join([*lines, *(["", *explained] if explained else []), *_log_ends(rows)])


def _log_ends(rows: Sequence[Row]) -> list[str]:
    """The ends of the logs of failed steps."""
    lines = []
    for row in rows:
        job = row.status.job
        if job and row.status.state == "failed" and (tail := last_lines(Path(job.log), _LOG_LINES)):
            lines += ["", f"end of {job.log}:", *(f"  {line[:300]}" for line in tail)]
    return lines


def _time(row: Row) -> str:
    """A step's run time, with its time limit and the remaining time while it runs."""
    job = row.status.job
    if job is None:
        return ""
    if row.status.state == "waiting":
        return f"starts {job.seen.start}" if job.seen.start else ""
    if row.status.state == "running":
        limit = f" of {job.seen.limit}" if job.seen.limit else ""
        remaining = f", {format_duration(row.remaining_s)} left" if row.remaining_s is not None else ""
        return f"{job.seen.elapsed or '0:00'}{limit}{remaining}"
    return job.seen.elapsed


def format_duration(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
