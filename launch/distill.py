"""`lavic distill`: stage 1. LoRA on vision tower and projector learns to say in five tokens what all of them say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from lavic.config import parse, settings
from lavic.data.remote_shards import CacheSettings
from lavic.launch.training import command, resource_estimate
from lavic.model.config import LoraSettings, ModelSettings
from lavic.tracking.settings import TrackingSettings
from lavic.train.config import LoopSettings

DESCRIPTION = """Stage 1, distillation: train the vision side until five tokens of a photo say what all of them say.

The language model is frozen. The photos' descriptions are those that `lavic describe` wrote beside the shards, else the
catalogue's. The same command goes on after any stop, with any number of processes.

  lavic distill --shards photos/train --valid photos/valid --out runs/distill --nproc 2

Writes OUT/bundle (the vision adapter, for `lavic embed --adapter OUT`), OUT/captions.json (loss and perplexity of the
validation descriptions: from all tokens, from five before, from five after), OUT/metrics.jsonl and OUT/checkpoints."""


@settings
class DistillSettings:
    """Train the vision adapter (stage 1)."""

    shards: Path
    """Set of shards to train on, with descriptions. Left out of it: photos of items that `valid` holds too, and photos
    whose bytes are those of one of `valid`'s."""
    valid: Path
    """Set of shards to validate with, with descriptions."""
    out: Path
    """The run's folder."""
    model: ModelSettings = ModelSettings()
    """The base model."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    loop: LoopSettings = LoopSettings(epochs=5.0, global_batch_size=32, lr=5e-5, weight_decay=1e-5)
    """The training loop."""
    max_length: PositiveInt = 512
    """Longest title and description with the words around them, tokens; longer photos are skipped and counted."""
    teacher_top_k: NonNegativeInt = 0
    """Also match the probabilities that the model, seeing all tokens, gives to so many likeliest words; 0: the
    description's words alone. Costs a pass over all tokens in every step."""
    teacher_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of that in the loss."""
    teacher_patches: NonNegativeFloat = 0.0
    """Weight of one more loss: how far each view's token is from the mean of those that the untrained model makes of
    the view's patches; 0: none. Costs a pass through the vision tower in every step."""
    nested: tuple[PositiveInt, ...] = ()
    """Train on the first so many views, one of these numbers for each photo (1 2 5), so that fewer tokens per item
    serve too; by default always on all."""
    shuffle: Literal["blocks", "shards"] = "blocks"
    """What is mixed in an epoch: 16 blocks of 256 neighbouring photos at a time, from anywhere in the set; or 8 whole
    shards at a time, each of which is then used up before the next: for a set that does not fit into --cache.bytes."""
    cache: CacheSettings = CacheSettings()
    """Copies of shards, where `shards` or `valid` is in an object store."""
    select: Literal["best", "last"] = "best"
    """Which adapter goes into the bundle: that of the lowest validation loss, or the last."""
    deepspeed: Path | None = None
    """A JSON file with more DeepSpeed settings."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the run is recorded."""
    nproc: PositiveInt = 1
    """Processes on this machine; inside torchrun or srun their number counts."""
    dry_run: bool = False
    """Print what the run would take (memory of each GPU, checkpoint, steps, time) and start nothing. No weights are
    read, and the data need not be there. For several nodes let `--nproc` say all processes."""


SETTINGS = DistillSettings
"""The command's settings, for `lavic.cli.command_module`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    from lavic.launch.training.distill_stage import DistillStage

    return command.run(DistillStage, resolve(argv), argv)


def resolve(argv: Sequence[str] | None) -> DistillSettings:
    """The command's settings from its arguments. Raises ConfigError."""
    return parse(DistillSettings, argv, command="distill", description=DESCRIPTION)


def estimate(settings: DistillSettings) -> str:
    """What the run would take on `settings.nproc` GPUs: memory, checkpoint, steps and time, one line each."""
    return str(resource_estimate.estimate("distill", settings, settings.nproc))


def is_complete(settings: DistillSettings) -> bool:
    """Whether the run has reached its end."""
    return command.is_complete(settings.out)
