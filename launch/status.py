"""`lavic submit status`: each step of a pipeline, its job, how far it is, and why one ended."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from lavic.config import Positional, load, parse, settings
from lavic.errors import ConfigError, LaunchError
from lavic.launch.jobs import held, read_jobs, write_jobs
from lavic.launch.parent import close_parent
from lavic.launch.pipeline import PipelineSettings
from lavic.launch.situation import Situation, refreshed, situations
from lavic.launch.steps import Layout, plan
from lavic.launch.whole import progress

DESCRIPTION = """Tells how a pipeline that `lavic submit` started is: each step's state, job, progress and log, and why
one failed or was cancelled.

A step is done when its result stands whole in its folder, whatever SLURM remembers of its job. Exit code 1 when a step
failed or was cancelled."""

log = logging.getLogger(__name__)


@settings
class Settings:
    """Which pipeline."""

    out: Annotated[Path, Positional]
    """The pipeline's folder."""
    json: bool = False
    """Print one JSON object for each step, for programs."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns 1 where a step failed or was cancelled."""
    chosen = parse(Settings, argv, command="submit status", description=DESCRIPTION)
    found = look(chosen.out)
    for situation in found.values():
        if chosen.json:
            print(json.dumps(_as_dict(situation)))
    if not chosen.json:
        print(table(found))
    return int(any(situation.state in ("failed", "cancelled") for situation in found.values()))


def look(out: Path) -> dict[str, Situation]:
    """How every step of the pipeline in `out` stands.

    Raises:
        ConfigError: There is no pipeline.
    """
    file = out / "pipeline.yaml"
    if not file.is_file():
        raise ConfigError(f"{out}: no pipeline.yaml; give the --out of a `lavic submit`")
    # where it stands now, should it have been moved
    pipeline = replace(load(PipelineSettings, file), out=out)
    at = Layout(out)
    jobs = read_jobs(at.out)
    try:
        with held(at.out):
            jobs = refreshed(read_jobs(at.out))
            write_jobs(at.out, jobs)
    except ConfigError:
        pass  # a `lavic submit` is writing there
    except (LaunchError, OSError) as error:
        log.warning("as last seen, for now: %s", error)
    found = {name: one for name, one in situations(plan(pipeline), jobs).items() if one.step.chosen}
    close_parent(pipeline, found.values())
    return found


def table(found: Mapping[str, Situation]) -> str:
    """The situations for a terminal."""
    rows = [("step", "state", "job", "progress", "log")]
    for name, one in found.items():
        log = one.job.log if one.job else ""
        rows.append((name, one.state, one.job.id if one.job else "", progress(one.step), log))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows
    ]
    told: dict[str, list[str]] = {}
    for name, one in found.items():
        if one.why and one.state != "done" and one.why != "Dependency":
            told.setdefault(f"{one.state}: {one.why}", []).append(name)
    whys = [f"{', '.join(names)}: {why}" for why, names in told.items()]
    return "\n".join([*lines, *(["", *whys] if whys else [])])


def _as_dict(one: Situation) -> dict[str, object]:
    job = one.job
    return {
        "step": one.step.name,
        "state": one.state,
        "why": one.why,
        "job": job.id if job else None,
        "slurm": job.state if job else None,
        "progress": progress(one.step),
        "place": str(one.step.place),
        "log": job.log if job else None,
    }
