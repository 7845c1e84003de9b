"""`lavic submit`: the pipeline as SLURM jobs that wait for each other; `lavic submit status`: how they are."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lavic.cli import said
from lavic.config import dump, parse
from lavic.data.atomic import write_whole
from lavic.data.catalog import find_files
from lavic.errors import ConfigError, DataError, LaunchError, LavicError
from lavic.launch import slurmctl
from lavic.launch.batch import Batch, batch, closing
from lavic.launch.jobs import Job, held, read_jobs, write_jobs
from lavic.launch.parent import open_parent, tracked
from lavic.launch.pipeline import PipelineSettings, StageSettings
from lavic.launch.situation import Situation, refreshed, situations
from lavic.launch.steps import Layout, Step, choose, plan
from lavic.train.settings import LoopSettings

DESCRIPTION = """Submits the pipeline as SLURM jobs that wait for each other: crawl, verify, describe, distill, embed,
tune, evaluate.

One yaml file says which stages there are, their configurations and what each asks of the cluster; the folders between
them are the pipeline's to fill in, all below OUT. Every setting of every stage is checked before the first job is
queued. The same command again submits what is neither done nor under way: done is what stands whole in its folder.

  lavic submit --config pipeline-7b --out /shared/amazon --dry-run
  lavic submit --config pipeline-7b --out /shared/amazon
  lavic submit status /shared/amazon

A stage that fails cancels those after it; `status` says why. `slurm/env.sh` holds what is peculiar to the site."""

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    words = list(argv or ())
    if words[:1] == ["status"]:
        from lavic.launch import status

        return status.main(words[1:])
    chosen = parse(PipelineSettings, words, command="submit", description=DESCRIPTION)
    steps = plan(chosen)
    picked = choose(steps, chosen)
    known = {step.name: check(step, chosen) for step in picked}
    if chosen.dry_run:
        from lavic.launch.rehearsal import rehearse

        print(rehearse(chosen, picked, known))
        return 0
    at = Layout(chosen.out)
    with held(at.out):
        return _submit(chosen, steps, picked, known)


def check(step: Step, chosen: PipelineSettings) -> dict[str, Any]:
    """A step's settings, as its command understands the words.

    Raises:
        ConfigError: It does not, or its ranks cannot share a batch; names the step.
    """
    asked: StageSettings = getattr(chosen, step.stage)
    try:
        settings: dict[str, Any] = yaml.safe_load(said(step.stage, [*step.words, "--print-config"])) or {}
        if "loop" in settings:
            LoopSettings(**settings["loop"]).split(asked.nodes * asked.ranks_per_node)
    except LavicError as error:
        raise ConfigError(f"{step.name}: {error}") from None
    return settings


def _submit(
    chosen: PipelineSettings, steps: Sequence[Step], picked: Sequence[Step], known: dict[str, dict[str, Any]]
) -> int:
    at = Layout(chosen.out)
    jobs = refreshed(read_jobs(at.out))
    now = situations(steps, jobs)
    todo = [step for step in picked if not now[step.name].settled]
    _check_inputs(todo, now)
    for step in todo:
        try:
            if why := slurmctl.test(batch(step, chosen).words()):
                log.warning("%s could not start now, it will wait: %s", step.name, why)
        except LaunchError as error:
            raise LaunchError(f"{step.name}: {error}") from None
    at.logs.mkdir(parents=True, exist_ok=True)
    write_whole(at.out / "pipeline.yaml", dump(replace(chosen, out=at.out, only=(), from_=None), command="submit"))
    parent = open_parent(chosen) if todo else ""
    for step in picked:
        job = jobs.get(step.name)
        if step in todo:
            made = batch(step, chosen, tracked(step.name, known[step.name], chosen, parent))
            job = _queue(made, _predecessors(step, steps, now, jobs, todo), jobs)
            write_jobs(at.out, jobs)
        print(f"{step.name:<16}{_told(now[step.name], step in todo, job)}", flush=True)
    write_jobs(at.out, jobs)
    if not todo:
        print(f"{at.out}: nothing to submit")
    elif chosen.tracking.mlflow:
        made = closing(chosen)
        slurmctl.submit(made.words([jobs[step.name].id for step in todo], kind="afterany"), made.env)
    print(f"how it goes: lavic submit status {at.out}")
    return 0


def _matching(pattern: str) -> list[str]:
    try:
        return find_files([pattern])
    except DataError:
        return []


def _check_inputs(todo: Sequence[Step], now: dict[str, Situation]) -> None:
    """Raises ConfigError where a step's files, from outside or from steps that are left out, are not there."""
    coming = {step.name for step in todo}
    for step in todo:
        for file in step.reads:
            if not Path(file).exists() and not _matching(file):
                raise ConfigError(f"{step.name} reads {file}: no such file")
        for need in step.needs:
            if need not in coming and not now[need].settled:
                raise ConfigError(
                    f"{step.name} needs {need}, which is not done ({now[need].step.place}): submit that stage too"
                )


def _predecessors(
    step: Step, steps: Sequence[Step], now: dict[str, Situation], jobs: dict[str, Job], todo: Sequence[Step]
) -> list[str]:
    """The nearest steps before this one that are in the queue."""
    by_name = {one.name: one for one in steps}
    found: list[str] = []
    for need in step.needs:
        if by_name[need] in todo or (need in jobs and now[need].state in ("running", "waiting")):
            found.append(need)
        else:
            found += _predecessors(by_name[need], steps, now, jobs, todo)
    return list(dict.fromkeys(found))


def _queue(made: Batch, after: Sequence[str], jobs: dict[str, Job]) -> Job:
    name = made.name
    try:
        number = slurmctl.submit(made.words([jobs[one].id for one in after]), made.env)
    except LaunchError as error:
        raise LaunchError(f"{name}: {error}; what was queued before it stays: run the same command again") from None
    jobs[name] = Job(number, tuple(after), str(made.log(number)), submitted=round(time.time(), 3))
    return jobs[name]


def _told(before: Situation, queued: bool, job: Job | None) -> str:
    if not queued:
        return f"{before.state}" + (f", job {job.id}" if job and before.state != "done" else "")
    assert job is not None
    waits = f", after {' and '.join(job.after)}" if job.after else ""
    again = f" (before: {before.state}, {before.why})" if before.job else ""
    return f"job {job.id}{waits}{again}"
