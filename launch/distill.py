"""`lavic distill`: stage 1. Trains LoRA on vision tower and projector to describe a photo from five tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from lavic.config import parse, settings
from lavic.data.remote_shards import CacheSettings
from lavic.launch.training import command, resource_estimate
from lavic.model.config import LoraSettings, ModelSettings
from lavic.tracking.settings import TrackingSettings
from lavic.train.config import LoopSettings

DESCRIPTION = """Stage 1, distillation: train the vision side so that five tokens of a photo suffice to describe it.

The language model is frozen. The descriptions are those of `lavic describe` beside the shards, or else the catalogue's.
The same command resumes after any stop, with any number of processes.

  lavic distill --shards photos/train --valid photos/valid --out runs/distill --nproc 2

Writes OUT/bundle (the vision adapter, for `lavic embed --adapter OUT`), OUT/captions.json (loss and perplexity of the
validation descriptions: from all tokens, from five before, from five after), OUT/metrics.jsonl and OUT/checkpoints."""


@settings
class DistillSettings:
    """Train the vision adapter (stage 1)."""

    shards: Path
    """Training set: shards with descriptions. Photos of items in `valid`, and photos with the same bytes as one in
    `valid`, are excluded."""
    valid: Path
    """Validation set: shards with descriptions."""
    out: Path
    """The run's folder."""
    model: ModelSettings = ModelSettings()
    """The base model."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    loop: LoopSettings = LoopSettings(epochs=5.0, global_batch_size=32, lr=5e-5, weight_decay=1e-5)
    """The training loop."""
    max_length: PositiveInt = 512
    """Maximum length of prompt and description, tokens; photos with longer ones are skipped and counted."""
    teacher_top_k: NonNegativeInt = 0
    """Also match the probabilities that the teacher, which sees all tokens, gives to its k most likely tokens; 0: use
    only the description. Costs a pass over all tokens in every step."""
    teacher_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of that in the loss."""
    teacher_patches: NonNegativeFloat = 0.0
    """Weight of another loss: the distance of each view's token from the mean of the untrained model's patch tokens; 0
    disables it. Costs a pass through the vision tower in every step."""
    nested: tuple[PositiveInt, ...] = ()
    """Train each photo on its first n views, n sampled from these numbers (1 2 5), so that the adapter also works with
    fewer tokens per item; by default always on all views."""
    shuffle: Literal["blocks", "shards"] = "blocks"
    """What is shuffled together in an epoch: 16 blocks of 256 adjacent photos, from anywhere in the set; or 8 complete
    shards, which are used up before the next ones: for a set that does not fit into --cache.bytes."""
    cache: CacheSettings = CacheSettings()
    """Cache of shards, if `shards` or `valid` is in an object store."""
    select: Literal["best", "last"] = "best"
    """Adapter for the bundle: that with the lowest validation loss, or the last."""
    deepspeed: Path | None = None
    """A JSON file with more DeepSpeed settings."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the run is recorded."""
    nproc: PositiveInt = 1
    """Processes on this machine; ignored inside torchrun or srun."""
    dry_run: bool = False
    """Print the resources of the run (memory of each GPU, checkpoint, steps, time) and start nothing. Reads no weights,
    and the data need not exist. For several nodes, set `--nproc` to the number of all processes."""


SETTINGS = DistillSettings
is_complete = command.is_complete
resolve = partial(parse, DistillSettings, command="distill", description=DESCRIPTION)
"""The settings of a command line; see `lavic.cli.command_module`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    from lavic.launch.training.distill_stage import DistillStage

    return command.run(DistillStage, resolve(argv), argv)


def estimate(settings: DistillSettings) -> str:
    """Resources of the run on `settings.nproc` GPUs: memory, checkpoint, steps and time, one line each."""
    return str(resource_estimate.estimate("distill", settings, settings.nproc))
