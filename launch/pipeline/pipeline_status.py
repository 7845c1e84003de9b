"""The status of a pipeline: which results are complete, what SLURM reports of the jobs, which results are stale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavic.cli import command_module
from lavic.errors import ConfigError, LavicError
from lavic.launch.pipeline.dag import Step
from lavic.launch.pipeline.digest_cache import DigestCache
from lavic.launch.pipeline.job_registry import Job, read_used
from lavic.launch.pipeline.settings import PipelineSettings, stage_settings
from lavic.launch.pipeline.step_digest import (
    StepInputs,
    StepRecord,
    current_inputs,
    reads_result_of,
    result_digest,
    with_results,
)
from lavic.launch.pipeline.step_status import StepStatus, step_statuses


@dataclass(frozen=True, kw_only=True)
class PipelineStatus:
    """The status of all steps at one moment."""

    steps: Mapping[str, StepStatus]
    inputs: Mapping[str, StepInputs]
    """What each step would be made from now; without the steps whose settings are not known."""
    differences: Mapping[str, Sequence[str]]
    """How `inputs` differs from what each step's result was made from."""
    records: Mapping[str, StepRecord]
    """What each step's result was made from."""

    @property
    def used(self) -> dict[str, Mapping[str, str]]:
        """For jobs that are done, by id: digests of the results of other steps that they read."""
        return {
            status.job.id: self.records[name].made.results
            for name, status in self.steps.items()
            if status.state in ("done", "stale") and status.job and name in self.records
        }


def pipeline_status(
    out: Path,
    steps: Sequence[Step],
    settings: Mapping[str, Any],
    jobs: Mapping[str, Job],
    records: Mapping[str, StepRecord],
) -> PipelineStatus:
    """The status of a pipeline. Steps with settings are compared with the records of what they were made from."""
    cache = DigestCache(out)
    complete = {step.name for step in steps if is_complete(step, cache)}
    results = {step.name: digest for step in steps if step.name in complete and (digest := result_digest(step, cache))}
    inputs_by_step = {
        step.name: current_inputs(step, settings[step.name], cache, results) for step in steps if step.name in settings
    }
    cache.save()
    used = read_used(out)
    records = dict(records)
    for step in steps:
        job = jobs.get(step.name)
        if step.name in records and job:
            # the results that a job has read are recorded when it is first seen to have ended
            current = {name: digest for name, digest in results.items() if reads_result_of(step, name)}
            results_read = used.get(job.id, current if step.name in complete and not job.seen.active else {})
            records[step.name] = with_results(records[step.name], results_read)
    differences = {
        name: records[name].differences(inputs) for name, inputs in inputs_by_step.items() if name in records
    }
    statuses = step_statuses(steps, jobs, complete, differences)
    return PipelineStatus(steps=statuses, inputs=inputs_by_step, differences=differences, records=records)


def is_complete(step: Step, cache: DigestCache) -> bool:
    """Whether a step's result is complete, by the files in its folder; its command decides."""
    command = command_module(step.stage)
    options: dict[str, Any] = {"cached": cache.cached} if step.stage == "describe" else {}
    return bool(command.is_complete(command.resolve(step.output_args), **options))


def resolve_settings(step: Step, pipeline: PipelineSettings) -> Any:
    """A step's settings, as its command resolves them.

    Raises:
        ConfigError: They are wrong, or its ranks cannot share a batch; names the step.
    """
    resources = stage_settings(pipeline, step.stage)
    try:
        settings = command_module(step.stage).resolve(step.args)
        if hasattr(settings, "loop"):
            settings.loop.split_batch(resources.nodes * resources.ranks_per_node)
    except LavicError as error:
        raise ConfigError(f"{step.name}: {error}") from None
    return settings
