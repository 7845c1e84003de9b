"""`lavic submit`: the pipeline as SLURM jobs that wait for each other; its status, logs and end are beside it."""

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
from lavic.launch.pipeline.dag import Layout, Step, choose, plan, rooted
from lavic.launch.pipeline.job_registry import Job, held, note_seen, read_jobs, write_jobs
from lavic.launch.pipeline.mlflow_parent import open_parent, tracked
from lavic.launch.pipeline.pipeline_status import Survey, check, survey
from lavic.launch.pipeline.settings import PipelineSettings
from lavic.launch.pipeline.stale_results import goes_on, set_aside
from lavic.launch.pipeline.step_digest import Record, matches, read_records, uses, write_records
from lavic.launch.pipeline.step_status import Situation, refreshed
from lavic.launch.slurm import client
from lavic.launch.slurm.sbatch_job import Batch, batch, closing
from lavic.storage.atomic import atomic_write

DESCRIPTION = """Submits the pipeline as SLURM jobs that wait for each other: crawl, verify, describe, distill, embed,
tune, evaluate.

One yaml file says which stages there are, their configurations and what each asks of the cluster; the folders between
them are the pipeline's to fill in, all below OUT. Every setting of every stage is checked before the first job is
queued. The same command again submits what is neither done nor under way: done is what stands whole in its folder and
was made with these settings and inputs. What was made with others is stale: it is moved to OUT/stale and made again,
and so is what depends on it; with --keep it is accepted as it is.

  lavic submit --config pipeline-7b --out /shared/amazon --dry-run
  lavic submit --config pipeline-7b --out /shared/amazon
  lavic submit status /shared/amazon --watch
  lavic submit logs /shared/amazon distill -f
  lavic submit cancel /shared/amazon

A stage that fails cancels those after it; `status` says why. `slurm/env.sh` holds what is peculiar to the site."""

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    words = list(argv or ())
    if words[:1] and words[0] in ("status", "cancel", "logs"):
        from lavic.launch.submit import cancel, logs, status

        return {"status": status, "cancel": cancel, "logs": logs}[words[0]].main(words[1:])
    chosen = rooted(parse(PipelineSettings, words, command="submit", description=DESCRIPTION))
    steps = plan(chosen)
    picked = choose(steps, chosen)
    known = {step.name: check(step, chosen) for step in picked}
    if chosen.dry_run:
        from lavic.launch.pipeline.dry_run import rehearse

        print(rehearse(chosen, picked, known))
        if missing := absent(picked, {}):
            print("\n== what is not there yet, without which nothing is submitted")
            print("\n".join(f"  {line}" for line in missing))
        return 0
    at = Layout(chosen.out)
    with held(at.out):
        _submit(chosen, steps, picked, known)
    if chosen.wait:
        from lavic.launch.submit.status import wait

        return wait(at.out)
    return 0


def _submit(
    chosen: PipelineSettings, steps: Sequence[Step], picked: Sequence[Step], known: dict[str, dict[str, Any]]
) -> None:
    at = Layout(chosen.out)
    jobs = refreshed(read_jobs(at.out))
    seen = survey(at.out, steps, known, jobs, read_records(at.out))
    note_seen(at.out, jobs, seen.used)
    now, records = seen.found, dict(seen.records)
    todo, again = _todo(chosen, picked, seen, known)
    if missing := absent(todo, now):
        raise ConfigError("; ".join(missing))
    for step in todo:
        try:
            if why := client.test(batch(step, chosen).words()):
                log.warning("%s could not start now, it will wait: %s", step.name, why)
        except LaunchError as error:
            raise LaunchError(f"{step.name}: {error}") from None
    at.logs.mkdir(parents=True, exist_ok=True)
    kept = {step.stage for step in picked} - {step.stage for step in todo}
    if todo or not (at.out / "pipeline.yaml").is_file():
        atomic_write(at.out / "pipeline.yaml", dump(_recorded(chosen, at, kept, records), command="submit"))
    parent = open_parent(chosen) if todo else ""
    for step in picked:
        wanted, name, before = seen.wanted[step.name], step.name, jobs.get(step.name)
        if step not in todo:
            # what nobody submitted was made by hand: it is taken as it is, and compared from now on
            record = records.get(name, Record(made=wanted))
            settled = now[name].state in ("done", "stale")
            records[name] = replace(record, accepted=wanted) if settled and seen.differ.get(name) else record
            print(f"{name:<16}{_told(now[name], seen.differ.get(name, ()))}", flush=True)
            continue
        moved = set_aside(step, at) if name in again else None
        coming = {other.name for other in todo}
        read = {other: digest for other, digest in wanted.results.items() if other not in coming}
        records[name] = Record(made=replace(wanted, results=read))
        write_records(at.out, records)
        made = batch(step, chosen, tracked(name, known[name], chosen, parent))
        job = _queue(made, _predecessors(step, steps, now, jobs, todo), jobs, at.out)
        waits = f", after {' and '.join(job.after)}" if job.after else ""
        why = f" (before: {now[name].state}, {now[name].why})" if before or now[name].state == "stale" else ""
        print(f"{name:<16}job {job.id}{waits}{why}{f'; what was there is now in {moved}' if moved else ''}", flush=True)
    write_records(at.out, records)
    write_jobs(at.out, jobs)
    if not todo:
        print(f"{at.out}: nothing to submit")
    elif chosen.tracking.mlflow:
        made = closing(chosen)
        _queue(made, [step.name for step in todo], jobs, at.out, kind="afterany")
    print(f"how it goes: lavic submit status {shlex.quote(str(at.out))}")


def _todo(
    chosen: PipelineSettings, picked: Sequence[Step], seen: Survey, known: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Step], set[str]]:
    """The steps to submit, and the names of those whose results are made again, from nothing.

    Raises:
        ConfigError: One of them, or one that reads its result, is under way.
    """
    todo, again, tried = [], set[str](), set[str]()
    for step in picked:
        now, follows = seen.found[step.name], [name for name in again if uses(step, name)]
        differ = seen.differ.get(step.name, ())
        ahead = [
            name for name, other in seen.found.items() if uses(step, name) and other.state in ("running", "waiting")
        ]
        stale = now.state == "stale" and not chosen.keep and bool(differ or ahead)
        if differ and now.state != "done" and not chosen.keep and goes_on(step, known[step.name], differ):
            # who trains on the set does so again if it has changed, which nobody knows yet; a look at it costs little
            stale = False
            if now.state == "stale":
                tried.add(step.name)
            differ = ()
        elif (
            step.stage in ("verify", "describe") and now.state in ("done", "stale") and (tried | again) & {*step.needs}
        ):
            tried.add(step.name)
        unfinished = now.state in ("open", "failed", "cancelled") and differ
        if step.stage in chosen.force or follows or stale or unfinished:
            again.add(step.name)
        if now.state in ("running", "waiting"):
            job = now.job.id if now.job else ""
            if step.name in again:
                why = f"it reads {' and '.join(follows)}" if follows else "--force names it"
                raise ConfigError(
                    f"{step.name} is {now.state} (job {job}) and would be made again, since {why}: "
                    f"end it with `lavic submit cancel {shlex.quote(str(chosen.out))} {step.name}`, or let it end"
                )
            if change := seen.differ.get(step.name):
                log.warning(
                    "%s goes on as job %s, which was submitted before a change (%s): cancel it and submit again",
                    *(step.name, job, "; ".join(change)),
                )
        elif step.name in again or step.name in tried or not now.settled:
            todo.append(step)
    return todo, again


def _recorded(
    chosen: PipelineSettings, at: Layout, kept: Collection[str], records: Mapping[str, Record]
) -> PipelineSettings:
    """The settings for pipeline.yaml: of stages of which nothing is submitted now, those that they were made with."""
    once = replace(chosen, only=(), from_=None, force=(), keep=False, wait=False)
    try:
        before = load(PipelineSettings, at.out / "pipeline.yaml")
    except (LavicError, OSError):
        return once
    made = {name.partition("-")[0] for name in records}
    return replace(once, **{stage: getattr(before, stage) for stage in kept if stage in made})


def absent(todo: Sequence[Step], now: Mapping[str, Situation]) -> list[str]:
    """What steps read, from outside or from steps that are left out, and is not there: a line for each."""
    coming = {step.name for step in todo}
    lines = [f"{step.name} reads {file}: no such file" for step in todo for file in step.reads if not matches(file)]
    for step in todo:
        for need in step.needs:
            if need not in coming and need in now and not now[need].settled:
                place = now[need].step.place
                lines.append(f"{step.name} needs {need}, which is not done ({place}): submit that stage too")
    return lines


def _predecessors(
    step: Step, steps: Sequence[Step], now: Mapping[str, Situation], jobs: dict[str, Job], todo: Sequence[Step]
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


def _queue(
    made: Batch,
    after: Sequence[str],
    jobs: dict[str, Job],
    out: Path,
    kind: Literal["afterok", "afterany"] = "afterok",
) -> Job:
    """Queues a job that is noted before sbatch is asked for it: whatever happens then, the next call looks for it."""
    name, before = made.name, jobs.get(made.name)
    job = Job(
        id="",
        mark=f"lavic-{uuid.uuid4().hex[:12]}",
        owner=client.user(),
        after=tuple(after),
        log=str(made.log("unknown")),
        submitted=round(time.time(), 3),
    )
    jobs[name] = job
    write_jobs(out, jobs)
    stays = "what was queued before it stays: run the same command again"
    try:
        id = client.submit(made.words([jobs[one].id for one in after], kind, job.mark), made.env, mark=job.mark)
    except client.NoAnswer as error:
        raise LaunchError(f"{name}: {error}; {stays}, which looks for that job first") from None
    except LaunchError as error:
        del jobs[name]
        write_jobs(out, jobs | ({name: before} if before else {}))
        raise LaunchError(f"{name}: {error}; {stays}") from None
    jobs[name] = replace(job, id=id, log=str(made.log(id)))
    write_jobs(out, jobs)
    return jobs[name]


def _told(now: Situation, differ: Sequence[str]) -> str:
    job = f", job {now.job.id}" if now.job and now.state not in ("done", "stale") else ""
    kept = f", kept as it is ({'; '.join(differ)})" if differ and now.state == "stale" else ""
    return f"{'done' if kept else now.state}{job}{kept}"
