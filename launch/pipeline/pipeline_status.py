"""How a pipeline stands: what is in its folders, what SLURM says of its jobs, and what of it is not what is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavic.cli import settings_class
from lavic.config import parse_values
from lavic.errors import ConfigError, LavicError
from lavic.launch.pipeline.completion import is_whole
from lavic.launch.pipeline.dag import Step
from lavic.launch.pipeline.digest_cache import Digests
from lavic.launch.pipeline.job_registry import Job, read_used
from lavic.launch.pipeline.settings import PipelineSettings, StageSettings
from lavic.launch.pipeline.step_digest import Recipe, Record, recipe, result_digest, uses, with_results
from lavic.launch.pipeline.step_status import Situation, situations
from lavic.train.config import LoopSettings


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A look at a pipeline."""

    found: Mapping[str, Situation]
    """How each step stands."""
    wanted: Mapping[str, Recipe]
    """What each step would be made from now; without those that were not compared."""
    differ: Mapping[str, Sequence[str]]
    """In what that is not what its result, or what there is of it, was made from."""
    records: Mapping[str, Record]
    """What is known of how each step was made."""

    @property
    def used(self) -> dict[str, Mapping[str, str]]:
        """For jobs that are done, by id: the results of other steps that they read."""
        return {
            now.job.id: self.records[name].made.results
            for name, now in self.found.items()
            if now.state in ("done", "stale") and now.job and name in self.records
        }


def survey(
    out: Path,
    steps: Sequence[Step],
    known: Mapping[str, Mapping[str, Any]],
    jobs: Mapping[str, Job],
    records: Mapping[str, Record],
) -> Survey:
    """Looks at a pipeline.

    Args:
        out: Its folder.
        steps: Each after those it needs.
        known: The settings of those that are compared.
        jobs: As last seen.
        records: Of how the steps were made.
    """
    digests = Digests(out)
    whole = {step.name for step in steps if is_whole(step, digests)}
    results = {step.name: digest for step in steps if step.name in whole and (digest := result_digest(step, digests))}
    wanted = {step.name: recipe(step, known[step.name], digests, results) for step in steps if step.name in known}
    digests.save()
    used = read_used(out)
    records = dict(records)
    for step in steps:
        job = jobs.get(step.name)
        if step.name in records and job:
            # the first look after a job's end says what it has read
            first = {name: digest for name, digest in results.items() if uses(step, name)}
            parse_values = used.get(job.id, first if step.name in whole and not job.seen.active else {})
            records[step.name] = with_results(records[step.name], parse_values)
    differ = {name: records[name].differences(recipe) for name, recipe in wanted.items() if name in records}
    return Survey(found=situations(steps, jobs, whole, differ), wanted=wanted, differ=differ, records=records)


def check(step: Step, chosen: PipelineSettings) -> dict[str, Any]:
    """A step's settings, as its command understands the words.

    Raises:
        ConfigError: It does not, or its ranks cannot share a batch; names the step.
    """
    asked: StageSettings = getattr(chosen, step.stage)
    try:
        settings = parse_values(settings_class(step.stage), step.words, command=step.stage)
        if "loop" in settings:
            LoopSettings(**settings["loop"]).split(asked.nodes * asked.ranks_per_node)
    except LavicError as error:
        raise ConfigError(f"{step.name}: {error}") from None
    return settings
