"""`--dry-run` of `lavic distill` and `lavic tune`: memory, checkpoint and steps, without weights, GPU or torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavic.distributed.context import DistributedContext
from lavic.model.config import ModelSettings
from lavic.model.dims import Shape
from lavic.model.hub import read_config
from lavic.train.measure.memory_estimate import Estimate, Sample, estimate

if TYPE_CHECKING:
    from lavic.launch.distill import DistillSettings
    from lavic.launch.tune import TuneSettings

STAGE_1 = Sample(tokens=200, targets=120, views=5, photo_tokens=5)
"""A typical sample of stage 1: the title, and a description of 115 tokens, the mean of the released ones."""
STAGE_2 = Sample(tokens=900, targets=10, views=0, photo_tokens=50)
"""Of stage 2: the median of the released prompts, ten candidates, an ID."""


def show(command: str, chosen: Any, world: DistributedContext) -> int:
    """Prints what a stage's run will take; returns the exit code."""
    print(forecast(command, chosen, world.size if world.size > 1 else chosen.nproc))
    return 0


def forecast(command: str, chosen: Any, ranks: int) -> Estimate:
    """What a stage will take.

    Args:
        command: `distill` or `tune`.
        chosen: Its settings.
        ranks: Processes of the run, on all nodes together.
    """
    return distill(chosen, ranks) if command == "distill" else tune(chosen, ranks)


def distill(chosen: DistillSettings, ranks: int) -> Estimate:
    """What stage 1 will take."""
    return estimate(
        Shape.of(read_config(chosen.model)),
        "vision",
        chosen.lora,
        chosen.loop,
        ranks=ranks,
        max_length=chosen.max_length,
        sample=STAGE_1,
        samples=photos(chosen.shards, chosen.valid),
        element=bytes_of(chosen.model),
    )


def tune(chosen: TuneSettings, ranks: int) -> Estimate:
    """What stage 2 will take."""
    return estimate(
        Shape.of(read_config(chosen.model)),
        "language",
        chosen.lora,
        chosen.loop,
        ranks=ranks,
        max_length=chosen.max_length,
        sample=STAGE_2,
        samples=targets(chosen),
        element=bytes_of(chosen.model),
    )


def bytes_of(model: ModelSettings) -> int:
    """Of a number: the estimate is for a GPU."""
    return 4 if model.dtype == "float32" else 2


def photos(shards: Path, valid: Path) -> int | None:
    """Photos to train on; None where they are not there yet."""
    from lavic.data.index.held_out import held_out
    from lavic.data.shard_dataset import ShardDataset
    from lavic.storage.paths import place

    if not place(shards).exists():
        return None
    every = ShardDataset(shards)
    return len(every) - (len(held_out(every, ShardDataset(valid))) if place(valid).exists() else 0)


def targets(chosen: TuneSettings) -> int | None:
    """Samples of stage 2: one for each target of a conversation; None where the file is not there yet.

    With `missing: drop` without what the store lacks, once the store stands.
    """
    from lavic.data.conversations import read_conversations
    from lavic.data.index.item_index import ItemIndex

    if not chosen.train.exists():
        return None
    rows = read_conversations(chosen.train, candidates=chosen.candidates)
    if chosen.missing == "drop" and (items := ItemIndex.of_store(chosen.store)):
        rows = [
            replace(row, targets=tuple(id for id in row.targets if id in items))
            for row in rows
            if sum(id in items for id in {*row.targets, *row.candidates[chosen.candidates]}) > 1
        ]
    return sum(len(set(row.targets)) for row in rows)
