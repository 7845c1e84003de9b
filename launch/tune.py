"""`lavic tune`: stage 2. LoRA on the language model learns to answer with the ID of the right candidate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from lavic.config import parse, settings
from lavic.launch.training import command, resource_estimate
from lavic.model.config import LoraSettings, ModelSettings
from lavic.tracking.settings import TrackingSettings
from lavic.train.config import LoopSettings

DESCRIPTION = """Stage 2, recommendation tuning: train the language model to answer a conversation and its candidates
with the ID of the right one.

The vision side is frozen, and not even loaded: the candidates' photos are the ready item tokens of the store. The same
command goes on after any stop, with any number of processes.

  lavic tune --store store --train train.jsonl --valid valid.jsonl --out runs/tune --nproc 2

Writes OUT/bundle (both adapters, for `lavic evaluate` and `lavic recommend`), OUT/metrics.jsonl and OUT/checkpoints."""


@settings
class TuneSettings:
    """Train the language adapter (stage 2)."""

    store: Path
    """Item store, made by `lavic embed`: of every candidate and target."""
    train: Path
    """Conversations to train on, jsonl."""
    valid: Path
    """Conversations to validate with, jsonl."""
    out: Path
    """The run's folder."""
    candidates: str = "candidates_st"
    """Which list of a conversation, a key of the jsonl."""
    top: PositiveInt | None = None
    """Show only the first so many of each list, such as 10 of the 100 that `lavic retrieve` finds; by default all."""
    tokens: Literal["items", "none"] = "items"
    """What stands behind a candidate's title: its item tokens, or nothing (the titles-only control)."""
    tokens_per_item: tuple[PositiveInt, ...] = ()
    """Show the first so many tokens of each item, by default all. Of several numbers (1 2 5) each list gets one, and
    the bundle works with any; for fewer than all, distil with --nested."""
    none_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the lists that are shown without their target and answered with "none of these"; above 0 that answer
    stands under every list."""
    missing: Literal["refuse", "drop"] = "refuse"
    """What happens to an item that is not in the store (its photo is gone, say): an error, or candidates leave their
    lists and rows without a target are left out, counted."""
    shuffle: bool = True
    """Show a list in another order each time it is trained on."""
    max_length: PositiveInt = 2048
    """Longest prompt with its target, tokens; a longer conversation loses its oldest comments."""
    model: ModelSettings = ModelSettings()
    """The base model, the one that made the store."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    loop: LoopSettings = LoopSettings(epochs=1.0, global_batch_size=32, lr=5e-5, weight_decay=1e-5)
    """The training loop."""
    select: Literal["best", "hit_rate", "last"] = "best"
    """Which adapter goes into the bundle: that of the lowest validation loss (best), that of the highest HitRatio@1 on
    validation lists (hit_rate; of equal ones the lowest loss), or the last. `--loop.early-stopping-patience` goes by
    the same."""
    ranked_lists: NonNegativeInt = 200
    """Validation lists that are ranked at each validation for HitRatio@1, beside the loss: evenly spread over those of
    the file that hold a target, and as they stand there. 0: none."""
    deepspeed: Path | None = None
    """A JSON file with more DeepSpeed settings."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the run is recorded."""
    nproc: PositiveInt = 1
    """Processes on this machine; inside torchrun or srun their number counts."""
    dry_run: bool = False
    """Print what the run would take (memory of each GPU, checkpoint, steps, time) and start nothing. No weights are
    read, and the data need not be there. For several nodes let `--nproc` say all processes."""


SETTINGS = TuneSettings
"""The command's settings, for `lavic.cli.command_module`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    from lavic.launch.training.tune_stage import TuneStage

    return command.run(TuneStage, resolve(argv), argv)


def resolve(argv: Sequence[str] | None) -> TuneSettings:
    """The command's settings from its arguments. Raises ConfigError."""
    return parse(TuneSettings, argv, command="tune", description=DESCRIPTION)


def estimate(settings: TuneSettings) -> str:
    """What the run would take on `settings.nproc` GPUs: memory, checkpoint, steps and time, one line each."""
    return str(resource_estimate.estimate("tune", settings, settings.nproc))


def is_complete(settings: TuneSettings) -> bool:
    """Whether the run has reached its end."""
    return command.is_complete(settings.out)
