"""`lavic submit status`: each step of a pipeline, its job, how far it is, how long it takes, and why one ended."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from lavic.config import Positional, load, parse, settings
from lavic.errors import ConfigError, LaunchError, LavicError
from lavic.launch.pipeline.dag import Layout, Step, plan
from lavic.launch.pipeline.job_registry import note_seen, read_jobs
from lavic.launch.pipeline.mlflow_parent import close_parent
from lavic.launch.pipeline.pipeline_status import check, survey
from lavic.launch.pipeline.progress import progress, remaining
from lavic.launch.pipeline.settings import PipelineSettings
from lavic.launch.pipeline.step_digest import read_records
from lavic.launch.pipeline.step_status import Situation, exit_code, last_lines, refreshed

DESCRIPTION = """Tells how a pipeline that `lavic submit` started is: state, job, progress, time and log of each step,
and why one failed, was cancelled or is stale.

A step is done when its result stands whole in its folder, whatever SLURM remembers of its job; it is stale when that
was made with other settings or inputs than pipeline.yaml and the input files have now. Anybody who can read the folder
can ask. Exit code 1 when a step failed or was cancelled.

  lavic submit status /shared/amazon
  lavic submit status /shared/amazon --watch
  lavic submit status /shared/amazon --json"""

POLL_S = 15.0
"""Between two looks at jobs that go on."""
_LINES = 5
"""Of the log of a step that failed."""

log = logging.getLogger(__name__)


@settings
class Settings:
    """Which pipeline."""

    out: Annotated[Path, Positional]
    """The pipeline's folder."""
    json: bool = False
    """Print one JSON object for each step, for programs."""
    watch: bool = False
    """Stay, and show it again when something has changed, until every job has ended."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is told of a step."""

    situation: Situation
    progress: str
    """How far it is."""
    remaining_s: float | None
    """Seconds that it is expected to take still, at the speed of late; None where that cannot be told."""

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        now, job = self.situation, self.situation.job
        ended = job is not None and now.state in ("failed", "cancelled")
        return {
            "step": now.step.name,
            "state": now.state,
            "why": now.why,
            "job": job.id if job else None,
            "slurm": job.seen.state if job else None,
            "progress": self.progress,
            "elapsed": job.seen.elapsed or None if job else None,
            "limit": job.seen.limit or None if job else None,
            "start": job.seen.start or None if job else None,
            "remaining_s": None if self.remaining_s is None else round(self.remaining_s),
            "exit_code": exit_code(job) if job else None,
            "place": str(now.step.place),
            "log": job.log if job else None,
            "last_lines": last_lines(Path(job.log), _LINES) if job and ended else [],
        }


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns 1 where a step failed or was cancelled."""
    chosen = parse(Settings, argv, command="submit status", description=DESCRIPTION)
    shown = ""
    while True:
        rows = look(chosen.out)
        text = "\n".join(json.dumps(row.as_dict()) for row in rows) if chosen.json else table(rows)
        if text != shown:
            if shown and not chosen.json:
                # a terminal shows the present alone, a log what changed
                print("\033[H\033[2J" if sys.stdout.isatty() else f"\n{time.strftime('%F %T')}")
            print(text, flush=True)
            shown = text
        if not chosen.watch or _ended(rows):
            return _code(rows)
        time.sleep(POLL_S)


def wait(out: Path) -> int:
    """Stays until every job of a pipeline has ended, telling what changes; returns 1 where a step failed."""
    before: dict[str, str] = {}
    while True:
        rows = look(out)
        for row in rows:
            now = row.situation
            if before.get(now.step.name, now.state) != now.state:
                why = f": {now.why}" if now.why and now.state != "done" else ""
                print(f"{time.strftime('%F %T')} {now.step.name}: {now.state}{why}", flush=True)
            before[now.step.name] = now.state
        if _ended(rows):
            print(table(rows), flush=True)
            return _code(rows)
        time.sleep(POLL_S)


def read(out: Path) -> tuple[PipelineSettings, list[Step]]:
    """The pipeline in a folder, and its steps.

    Raises:
        ConfigError: There is none.
    """
    file = out / "pipeline.yaml"
    if not file.is_file():
        raise ConfigError(f"{out}: no pipeline.yaml; give the --out of a `lavic submit`")
    # where it stands now, should it have been moved
    pipeline = replace(load(PipelineSettings, file), out=out)
    return pipeline, plan(pipeline, files=False)


def behind_out(argv: Sequence[str], flag: str) -> list[str]:
    """The words of a command that takes OUT, with those that follow OUT given to a flag."""
    count = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
    return [*argv[:1], *argv[count:], flag, *argv[1:count]] if count > 1 else [*argv]


def pick(steps: Sequence[Step], names: Sequence[str]) -> list[str]:
    """The names of the steps that are named, by their own name or by their stage's; of all where none is.

    Raises:
        ConfigError: One is not in the pipeline.
    """
    for name in names:
        if name not in {word for step in steps for word in (step.name, step.stage)}:
            raise ConfigError(f"{name}: no step or stage of this pipeline ({', '.join(step.name for step in steps)})")
    return [step.name for step in steps if not names or step.name in names or step.stage in names]


def look(out: Path) -> list[Row]:
    """How every step of the pipeline in `out` stands. Takes no lock: whoever may read the folder may ask.

    Raises:
        ConfigError: There is no pipeline.
    """
    pipeline, steps = read(out)
    at = Layout(out)
    jobs = read_jobs(at.out)
    try:
        jobs = refreshed(jobs)
    except LaunchError as error:
        log.warning("as last seen, for now: %s", error)
        jobs = {name: job for name, job in jobs.items() if job.id}
    seen = survey(at.out, steps, _known(steps, pipeline), jobs, read_records(at.out))
    note_seen(at.out, jobs, seen.used)
    found = [now for now in seen.found.values() if now.step.chosen]
    with contextlib.suppress(OSError):  # another user, who may not write here
        close_parent(pipeline, found)
    rows = []
    for now in found:
        photos = getattr(pipeline.photos, now.step.name.rpartition("-")[2], None)
        left = remaining(now.step, photos.expected if photos else None) if now.state == "running" else None
        rows.append(Row(situation=now, progress=progress(now.step), remaining_s=left))
    return rows


def _known(steps: Sequence[Step], pipeline: PipelineSettings) -> dict[str, dict[str, Any]]:
    """The settings of the steps; without those of a step whose configuration is gone, which is not compared then."""
    known = {}
    for step in steps:
        try:
            known[step.name] = check(step, pipeline)
        except LavicError as error:
            log.warning("not compared with its settings: %s", error)
    return known


def _ended(rows: Sequence[Row]) -> bool:
    return not any(row.situation.state in ("running", "waiting") for row in rows)


def _code(rows: Sequence[Row]) -> int:
    return int(any(row.situation.state in ("failed", "cancelled") for row in rows))


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal, then why steps are as they are, and the last lines of the logs of those that failed."""
    cells = [("step", "state", "job", "time", "progress", "log")]
    for row in rows:
        now, job = row.situation, row.situation.job
        cells.append(
            (now.step.name, now.state, job.id if job else "", _time(row), row.progress, job.log if job else "")
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]) - 1)]
    lines = [
        "  ".join([*(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in cells
    ]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        now = row.situation
        if now.why and now.state != "done" and now.why != "Dependency":
            code = exit_code(now.job) if now.job and now.state == "failed" else None
            ended = f" (exit code {code})" if code else ""
            reasons.setdefault(f"{now.state}{ended}: {now.why}", []).append(now.step.name)
    whys = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
    return "\n".join([*lines, *(["", *whys] if whys else []), *_tails(rows)])


def _tails(rows: Sequence[Row]) -> list[str]:
    """The ends of the logs of the steps that failed."""
    lines = []
    for row in rows:
        job = row.situation.job
        if job and row.situation.state == "failed" and (tail := last_lines(Path(job.log), _LINES)):
            lines += ["", f"{job.log} ends with:", *(f"  {line[:300]}" for line in tail)]
    return lines


def _time(row: Row) -> str:
    """How long a step has taken, and how long it may or will take."""
    job = row.situation.job
    if job is None:
        return ""
    if row.situation.state == "waiting":
        return f"starts {job.seen.start}" if job.seen.start else ""
    if row.situation.state == "running":
        most = f" of {job.seen.limit}" if job.seen.limit else ""
        left = f", {spell(row.remaining_s)} left" if row.remaining_s is not None else ""
        return f"{job.seen.elapsed or '0:00'}{most}{left}"
    return job.seen.elapsed


def spell(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
