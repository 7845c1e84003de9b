"""The dry run: everything that `lavic submit` would do, and what it would cost, as text."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lavic.data.manifest import Manifest
from lavic.errors import ConfigError, DataError
from lavic.launch.distill import DistillSettings
from lavic.launch.pipeline.dag import Layout, Step
from lavic.launch.pipeline.mlflow_parent import tracked
from lavic.launch.pipeline.settings import PipelineSettings
from lavic.launch.slurm.sbatch_job import Batch, batch, closing, scripts
from lavic.launch.training.resource_estimate import forecast, photos, targets
from lavic.launch.tune import TuneSettings
from lavic.model.config import ModelSettings
from lavic.model.dims import Shape
from lavic.model.hub import read_config
from lavic.model.tiling import VIEWS
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.config import read_json, zero2_config

PARENT = "PARENT"
"""Stands for the id of the parent run, which is made when the jobs are."""

PHOTO_BYTES, BESIDE_BYTES = 48_000, 2_500
"""Of a photo in a shard (500 pixels on the long side), and of what stands beside it: docs/scaling.md has them too."""

RANKED = ("describe", "distill", "embed", "tune", "evaluate")
"""Stages that run in ranks."""


def rehearse(chosen: PipelineSettings, steps: Sequence[Step], known: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of a dry run.

    Args:
        chosen: The pipeline.
        steps: Those to be submitted, in order.
        known: Settings of each, resolved.
    """
    blocks, used = [], []
    names = [step.name for step in steps]
    for step in steps:
        made = batch(step, chosen, tracked(step.name, known[step.name], chosen, PARENT))
        after = [need for need in step.needs if need in names]
        head = f"== {step.name}" + (f", after {' and '.join(after)}" if after else "")
        words = made.words([f"<{name}>" for name in after])
        facts = [f"  {line}" for line in _facts(chosen, step, made, known)]
        blocks.append("\n".join([head, *_command(made, words), *facts]))
        used.append(made.script)
    if chosen.tracking.mlflow:
        made = closing(chosen)
        words = made.words([f"<{name}>" for name in names], kind="afterany")
        blocks.append("\n".join(["== status, after all others, however they end", *_command(made, words)]))
        used.append(made.script)
    beside = (scripts(chosen) / name for name in ("job.sh", "env.sh"))
    for script in dict.fromkeys((*used, *(file for file in beside if file.is_file()))):
        blocks.append(f"== {script}\n{script.read_text('utf-8').rstrip()}")
    return "\n\n".join([f"{Layout(chosen.out).out}: {len(steps)} steps, none submitted", *blocks])


def _command(made: Batch, words: Sequence[str]) -> Iterator[str]:
    """The job as a line for a shell to read, one word a line; sbatch itself is given the words as they are."""
    for name, value in made.env.items():
        yield f"  {name}={shlex.quote(value)} \\"
    yield "  sbatch \\"
    options = words[: words.index(str(made.script))]
    for word in options:
        yield f"    {shlex.quote(word)} \\"
    yield f"    {shlex.quote(str(made.script))} \\"
    yield f"    {shlex.join(made.command)}"


def _facts(
    chosen: PipelineSettings, step: Step, made: Batch, settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    known = settings[step.name]
    if step.stage in RANKED:
        yield from _ranks(made)
    if step.stage == "crawl":
        count = _photos(chosen, step.name)
        yield f"photos: {_about(count)}"
        if count:
            each = PHOTO_BYTES + BESIDE_BYTES
            yield f"bytes: {_size(count * each)} of shards, at {_size(each)} a photo (docs/scaling.md)"
    elif step.stage in ("distill", "tune"):
        yield from _training(chosen, step, made, known)
    elif step.stage == "describe" and (shape := _shape(known)):
        yield _weights(shape.parameters, made)
    elif step.stage == "embed" and (shape := _shape(known)):
        count, element = _photos(chosen, "train"), 4 if known["precision"] == "float32" else 2
        yield (
            f"bytes: {VIEWS} x {shape.vision_hidden} numbers an item, {_size(shape.store_bytes(1, element))}"
            + (f"; {_size(shape.store_bytes(count, element))} for {_about(count)} items" if count else "")
        )
        yield _weights(shape.tower + shape.projector, made)
    elif step.stage == "evaluate" and (shape := _shape(settings.get("tune", {}))):
        yield _weights(shape.loaded("language"), made)  # the bundle's model, which stage 2 makes of its own


def _shape(known: Mapping[str, Any]) -> Shape | None:
    """Of a stage's model; None where it is not known, or has not been downloaded yet."""
    try:
        return Shape.of(read_config(ModelSettings(**known["model"]))) if "model" in known else None
    except ConfigError:
        return None


def _weights(parameters: int, made: Batch) -> str:
    return f"memory of a rank: {_size(parameters * (2 if made.asked.gpus else 4))} of weights, and its batch"


def _ranks(made: Batch) -> Iterator[str]:
    """What each rank finds in its environment."""
    nodes, each = made.asked.nodes, made.asked.ranks_per_node
    yield f"ranks: {nodes * each} = {_many(nodes, 'node')} x {each}"
    threads = max(1, made.asked.cpus // each)
    yield (
        f"every rank: WORLD_SIZE={nodes * each} LOCAL_WORLD_SIZE={each} OMP_NUM_THREADS={threads} "
        "MASTER_ADDR=<the job's first node> MASTER_PORT=<from the job's id>"
    )
    for node in range(nodes):
        first, last = node * each, node * each + each - 1
        if each == 1:
            yield f"rank {first}: GROUP_RANK={node} RANK={first} LOCAL_RANK=0"
        else:
            yield f"ranks {first} to {last}: GROUP_RANK={node} RANK={first}..{last} LOCAL_RANK=0..{each - 1}"


def _training(chosen: PipelineSettings, step: Step, made: Batch, known: Mapping[str, Any]) -> Iterator[str]:
    ranks = made.asked.nodes * made.asked.ranks_per_node
    loop = LoopSettings(**known["loop"])
    micro, accumulation = loop.split(ranks)
    parts = (_many(micro, "sample"), _many(accumulation, "micro step"), _many(ranks, "rank"))
    batch = loop.global_batch_size
    uneven = "" if micro * accumulation * ranks == batch else " (the last micro step is smaller)"
    yield f"effective batch: {batch} = {' x '.join(parts)}{uneven}"
    samples, of = _samples(chosen, step, known)
    if loop.steps:
        yield f"steps: {loop.steps}"
    elif samples:
        yield f"steps: {loop.total(samples)} = {_many(loop.epochs, 'epoch')} of {_about(samples)} {of} / {batch}"
    else:
        yield f"steps: {_many(loop.epochs, 'epoch')} of {of} / {batch}; how many {of} is not known yet"
    half = made.asked.gpus > 0 and known["model"]["dtype"] != "float32"
    extra = read_json(Path(known["deepspeed"]) if known.get("deepspeed") else None)
    config = zero2_config(micro_batch=micro, accumulation=accumulation, clip=loop.max_grad_norm, bf16=half, extra=extra)
    yield f"DeepSpeed: {json.dumps(config, sort_keys=True)}"
    # the stage's command knows best what it takes; steps it knows only where its training set stands already
    kind = DistillSettings if step.stage == "distill" else TuneSettings
    estimate = str(forecast(step.stage, TypeAdapter(kind).validate_python(known), ranks))
    yield from (line for line in estimate.splitlines() if not line.startswith("steps "))


def _samples(chosen: PipelineSettings, step: Step, known: Mapping[str, Any]) -> tuple[int | None, str]:
    """How many samples a training stage has, where that is known, and what they are: as the training counts them."""
    if step.stage == "distill":
        try:
            shards, valid = Path(known["shards"]), Path(known["valid"])
            return photos(shards, valid) or _photos(chosen, "train"), "photos"
        except DataError:  # a set that is not whole yet
            return _photos(chosen, "train"), "photos"
    file = chosen.conversations.train
    if file is None or not file.is_file():
        return None, "targets"
    return targets(TypeAdapter(TuneSettings).validate_python(known)), "targets"


def _photos(chosen: PipelineSettings, name: str) -> int | None:
    """Photos of the set that a step's name ends in: as its manifest says, else as expected."""
    split = name.rpartition("-")[2]
    if split not in ("train", "valid"):
        return None
    try:
        return Manifest.load(Layout(chosen.out).shards(split), check=False).samples
    except DataError:
        expected: int | None = getattr(chosen.photos, split).expected
        return expected


def _about(count: int | None) -> str:
    return "not known yet; photos.SET.expected says about how many" if count is None else f"{count:,}"


def _many(count: float, noun: str) -> str:
    """A number of things."""
    return f"{count:g} {noun}" + "s" * (count != 1)


def _size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError
