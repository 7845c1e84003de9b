"""`lavic tune`: stage 2. Trains LoRA on the language model to answer with the ID of the right candidate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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

The vision side is frozen and not loaded: the candidates' photos are the item tokens of the store. The same command
resumes after any stop, with any number of processes.

  lavic tune --store store --train train.jsonl --valid valid.jsonl --out runs/tune --nproc 2

Writes OUT/bundle (both adapters, for `lavic evaluate` and `lavic recommend`), OUT/metrics.jsonl and OUT/checkpoints."""


@settings
class TuneSettings:
    """Train the language adapter (stage 2)."""

    store: Path
    """Item store by `lavic embed`, with every candidate and target."""
    train: Path
    """Training conversations, jsonl."""
    valid: Path
    """Validation conversations, jsonl."""
    out: Path
    """The run's folder."""
    candidates: str = "candidates_st"
    """Key of the candidate list in the jsonl."""
    top: PositiveInt | None = None
    """Truncate each list to its first candidates, such as 10 of the 100 by `lavic retrieve`; by default none is
    truncated."""
    tokens: Literal["items", "none"] = "items"
    """What follows a candidate's title: its item tokens, or nothing (the titles-only control)."""
    tokens_per_item: tuple[PositiveInt, ...] = ()
    """Use only the first n tokens of each item, by default all. With several numbers (1 2 5), n is sampled for each
    list, and the bundle works with any of them; for fewer than all, distill with --nested."""
    none_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the lists that are shown without their target and answered with "none of these"; above 0, every list
    ends with that answer."""
    missing: Literal["refuse", "drop"] = "refuse"
    """What to do about items that are not in the store, for example without a photo: `refuse` is an error, `drop`
    removes candidates from their lists and rows without a target, and counts them."""
    shuffle: bool = True
    """Shuffle a list each time it is used."""
    max_length: PositiveInt = 2048
    """Maximum length of prompt and target, tokens; a longer conversation loses its oldest comments."""
    model: ModelSettings = ModelSettings()
    """The base model, which must be that of the store."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    loop: LoopSettings = LoopSettings(epochs=1.0, global_batch_size=32, lr=5e-5, weight_decay=1e-5)
    """The training loop."""
    select: Literal["best", "hit_rate", "last"] = "best"
    """Adapter for the bundle: that with the lowest validation loss (best), that with the highest HitRatio@1 on
    validation lists (hit_rate; then the lowest loss), or the last. `--loop.early-stopping-patience` uses the same
    metric."""
    ranked_lists: NonNegativeInt = 200
    """Number of validation lists that are ranked for HitRatio@1 at each validation: evenly spread over those that have
    a target, in their original order. 0: none."""
    deepspeed: Path | None = None
    """A JSON file with more DeepSpeed settings."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the run is recorded."""
    nproc: PositiveInt = 1
    """Processes on this machine; ignored inside torchrun or srun."""
    dry_run: bool = False
    """Print the resources of the run (memory of each GPU, checkpoint, steps, time) and start nothing. Reads no weights,
    and the data need not exist. For several nodes, set `--nproc` to the number of all processes."""


SETTINGS = TuneSettings
is_complete = command.is_complete
resolve = partial(parse, TuneSettings, command="tune", description=DESCRIPTION)
"""The settings of a command line; see `lavic.cli.command_module`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    from lavic.launch.training.tune_stage import TuneStage

    return command.run(TuneStage, resolve(argv), argv)


def estimate(settings: TuneSettings) -> str:
    """Resources of the run on `settings.nproc` GPUs: memory, checkpoint, steps and time, one line each."""
    return str(resource_estimate.estimate("tune", settings, settings.nproc))
