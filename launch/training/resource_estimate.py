"""What `lavic distill` and `lavic tune` will take (`--dry-run`): needs no weights, GPU or torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavic.model.dims import ModelDims
from lavic.model.hub import read_config
from lavic.train.measure.memory_estimate import ResourceEstimate, TypicalSample, estimate_resources

if TYPE_CHECKING:
    from lavic.launch.tune import TuneSettings

DISTILL_SAMPLE = TypicalSample(tokens=200, targets=120, views=5, photo_tokens=5)
"""A sample of stage 1: a title, and a description of 115 tokens, the mean of the released ones."""
TUNE_SAMPLE = TypicalSample(tokens=900, targets=10, views=0, photo_tokens=50)
"""A sample of stage 2: the median length of the released prompts, ten candidates, an ID."""


def estimate(command: str, settings: Any, ranks: int) -> ResourceEstimate:
    """What a run of `distill` or `tune` will take with so many processes, on all nodes together."""
    distill = command == "distill"
    return estimate_resources(
        ModelDims.from_config(read_config(settings.model)),
        "vision" if distill else "language",
        settings.lora,
        settings.loop,
        ranks=ranks,
        max_length=settings.max_length,
        sample=DISTILL_SAMPLE if distill else TUNE_SAMPLE,
        samples=count_photos(settings.shards, settings.valid) if distill else count_targets(settings),
        element=4 if settings.model.dtype == "float32" else 2,  # the estimate is for a GPU
    )


def count_photos(shards: Path, valid: Path) -> int | None:
    """Photos to train on; None where the set does not exist yet."""
    from lavic.data.index.held_out import held_out
    from lavic.data.shard_dataset import ShardDataset
    from lavic.storage.paths import as_path

    if not as_path(shards).exists():
        return None
    photos = ShardDataset(shards)
    return len(photos) - (len(held_out(photos, ShardDataset(valid))) if as_path(valid).exists() else 0)


def count_targets(settings: TuneSettings) -> int | None:
    """Samples of stage 2: one for each target of a conversation; None where the file does not exist yet.

    With `missing: drop`, those in the store alone, once the store exists.
    """
    from lavic.data.conversations import read_conversations
    from lavic.data.index.item_index import ItemIndex

    if not settings.train.exists():
        return None
    rows = read_conversations(settings.train, candidates=settings.candidates, top=settings.top)
    rows = [row for row in rows if row.candidates[settings.candidates]]
    if settings.missing == "drop" and (items := ItemIndex.of_store(settings.store)):
        rows = [
            replace(row, targets=tuple(id for id in row.targets if id in items))
            for row in rows
            if sum(id in items for id in {*row.targets, *row.candidates[settings.candidates]}) > 1
            and any(id in items for id in row.candidates[settings.candidates])
        ]
    return sum(len(set(row.targets)) for row in rows)
