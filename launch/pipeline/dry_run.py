"""The dry run: every job that `lavic submit` would submit, and estimates of what it takes, as text."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lavic.cli import command_module
from lavic.data.manifest import Manifest
from lavic.errors import DataError
from lavic.launch.pipeline.dag import Layout, Step
from lavic.launch.pipeline.mlflow_parent import tracking_args
from lavic.launch.pipeline.settings import PipelineSettings
from lavic.launch.slurm.sbatch_job import SbatchJob, script_folder, status_job, step_job
from lavic.launch.training.resource_estimate import count_photos, count_targets
from lavic.train.deepspeed.config import read_deepspeed_config, zero2_config

PARENT = "PARENT"
"""Stands for the id of the parent run, which does not exist yet."""

RANKED = ("describe", "distill", "embed", "tune-retriever", "tune", "evaluate")
"""Stages that run as ranks."""


def dry_run_text(pipeline: PipelineSettings, steps: Sequence[Step], settings: Mapping[str, Any]) -> str:
    """The text of a dry run: the steps to submit, in order, with the settings of each one's command."""
    blocks, scripts = [], []
    names = [step.name for step in steps]
    for step in steps:
        chosen = settings[step.name]
        job = step_job(step, pipeline, chosen, tracking_args(step.name, chosen, pipeline, PARENT))
        dependencies = [need for need in step.needs if need in names]
        header = f"== {step.name}" + (f", after {' and '.join(dependencies)}" if dependencies else "")
        args = job.args([f"<{name}>" for name in dependencies])
        lines = [f"  {line}" for line in _estimate_lines(pipeline, step, job, settings)]
        blocks.append("\n".join([header, *_shell_command(job, args), *lines]))
        scripts.append(job.script)
    if pipeline.tracking.mlflow:
        job = status_job(pipeline)
        args = job.args([f"<{name}>" for name in names], kind="afterany")
        blocks.append("\n".join(["== status, after all others, however they end", *_shell_command(job, args)]))
        scripts.append(job.script)
    sourced = (script_folder(pipeline) / name for name in ("job.sh", "env.sh"))
    for script in dict.fromkeys((*scripts, *(file for file in sourced if file.is_file()))):
        blocks.append(f"== {script}\n{script.read_text('utf-8').rstrip()}")
    return "\n\n".join([f"{Layout(pipeline.out).out}: {len(steps)} steps, none submitted", *blocks])


def _shell_command(job: SbatchJob, args: Sequence[str]) -> Iterator[str]:
    """The job as a shell command, one argument a line; sbatch itself gets the arguments without a shell."""
    for name, value in job.env.items():
        yield f"  {name}={shlex.quote(value)} \\"
    yield "  sbatch \\"
    for option in args[: args.index(str(job.script))]:
        yield f"    {shlex.quote(option)} \\"
    yield f"    {shlex.quote(str(job.script))} \\"
    yield f"    {shlex.join(job.command)}"


def _estimate_lines(
    pipeline: PipelineSettings, step: Step, job: SbatchJob, settings: Mapping[str, Any]
) -> Iterator[str]:
    if step.stage in RANKED:
        yield from _rank_lines(job)
    command, chosen = command_module(step.stage), _as_on_nodes(settings[step.name], job)
    if step.stage in ("distill", "tune"):
        yield from _training_lines(pipeline, step, job, settings[step.name])
        return
    if step.stage in ("crawl", "embed", "retrieve"):
        split = step.name.rpartition("-")[2] if step.stage == "crawl" else "train"
        expected = _photo_count(pipeline, split)
        yield from command.estimate(chosen, expected=expected).splitlines()
        if expected is None:
            yield f"photos.{split}.expected: set it for estimates of sizes and steps"
        return
    if step.stage == "evaluate" and chosen.model.name is None and "tune" in settings:
        # the bundle's base model; the bundle itself may not exist yet
        chosen = replace(chosen, model=replace(chosen.model, name=settings["tune"].model.name))
    yield from command.estimate(chosen).splitlines()


def _as_on_nodes(settings: Any, job: SbatchJob) -> Any:
    """A command's settings with `dtype: auto` replaced by what it means on the job's nodes, where they have no GPU."""
    if job.resources.gpus:
        return settings
    model: Any = getattr(settings, "model", None)
    if getattr(model, "dtype", "") == "auto":
        return replace(settings, model=replace(model, dtype="float32"))
    return replace(settings, dtype="float32") if getattr(settings, "dtype", "") == "auto" else settings


def _rank_lines(job: SbatchJob) -> Iterator[str]:
    """The environment variables of each rank."""
    nodes, per_node = job.resources.nodes, job.resources.ranks_per_node
    yield f"ranks: {nodes * per_node} = {_count(nodes, 'node')} x {per_node}"
    threads = max(1, job.resources.cpus // per_node)
    yield (
        f"every rank: WORLD_SIZE={nodes * per_node} LOCAL_WORLD_SIZE={per_node} OMP_NUM_THREADS={threads} "
        "MASTER_ADDR=<the job's first node> MASTER_PORT=<from the job's id>"
    )
    for node in range(nodes):
        first, last = node * per_node, node * per_node + per_node - 1
        if per_node == 1:
            yield f"rank {first}: GROUP_RANK={node} RANK={first} LOCAL_RANK=0"
        else:
            yield f"ranks {first} to {last}: GROUP_RANK={node} RANK={first}..{last} LOCAL_RANK=0..{per_node - 1}"


def _training_lines(pipeline: PipelineSettings, step: Step, job: SbatchJob, settings: Any) -> Iterator[str]:
    ranks, loop = job.resources.nodes * job.resources.ranks_per_node, settings.loop
    batch = loop.global_batch_size
    micro, accumulation = loop.split_batch(ranks)
    parts = (_count(micro, "sample"), _count(accumulation, "micro-step"), _count(ranks, "rank"))
    uneven = "" if micro * accumulation * ranks == batch else " (the last micro-step is smaller)"
    yield f"effective batch: {batch} = {' x '.join(parts)}{uneven}"
    samples, unit = _sample_count(pipeline, step, settings)
    if loop.steps:
        yield f"steps: {loop.steps}"
    elif samples:
        epochs = _count(loop.epochs, "epoch")
        yield f"steps: {loop.total_steps(samples)} = {epochs} of {samples:,} {unit} / {batch}"
    else:
        yield f"steps: {_count(loop.epochs, 'epoch')} of {unit} / {batch}; the number of {unit} is not known yet"
    bf16 = job.resources.gpus > 0 and settings.model.dtype != "float32"
    config = zero2_config(
        micro_batch=micro,
        accumulation=accumulation,
        clip=loop.max_grad_norm,
        bf16=bf16,
        extra=read_deepspeed_config(settings.deepspeed),
    )
    yield f"DeepSpeed: {json.dumps(config, sort_keys=True)}"
    # its own "steps" line only counts samples that exist already
    text = command_module(step.stage).estimate(replace(settings, nproc=ranks))
    yield from (line for line in text.splitlines() if not line.startswith("steps "))


def _sample_count(pipeline: PipelineSettings, step: Step, settings: Any) -> tuple[int | None, str]:
    """The number of a training's samples as it counts them, where that is known, and what a sample is."""
    if step.stage == "tune":
        file = pipeline.conversations.train
        return (count_targets(settings) if file and file.is_file() else None), "targets"
    try:
        return count_photos(settings.shards, settings.valid) or _photo_count(pipeline, "train"), "photos"
    except DataError:  # a set that is not complete yet
        return _photo_count(pipeline, "train"), "photos"


def _photo_count(pipeline: PipelineSettings, split: str) -> int | None:
    """Photos of a set: by its manifest, else as expected."""
    try:
        return Manifest.load(Layout(pipeline.out).shards(split), check=False).samples
    except DataError:
        expected: int | None = getattr(pipeline.photos, split).expected
        return expected


def _count(number: float, noun: str) -> str:
    """A number with its noun, in the plural where it must be."""
    return f"{number:g} {noun}" + "s" * (number != 1)
