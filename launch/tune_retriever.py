"""`lavic tune-retriever`: trains the two-tower head that searches the catalogue by photos and titles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from lavic.config import parse, settings
from lavic.errors import ConfigError
from lavic.launch.training import command
from lavic.model.config import ModelSettings
from lavic.model.dims import known_dims, weights_estimate
from lavic.storage import format_bytes
from lavic.tracking.settings import TrackingSettings
from lavic.train.retrieval.settings import HeadSettings

DESCRIPTION = """Train the retriever of item tokens: a small projection for conversations and one for items, so that the
items of a whole catalogue can be searched by their photos and titles.

The base model is frozen and without the adapter of stage 2. Its features of conversations and items are computed once,
by all processes, and kept in OUT/features; the heads are then trained by the first process, in minutes, with the other
items of a batch as negatives. The same command resumes after any stop.

  lavic tune-retriever --store store --train train.jsonl --valid valid.jsonl --out runs/retriever

Writes OUT/bundle (for `lavic retrieve --methods tokens --tokens.retriever OUT`) and OUT/metrics.jsonl."""


@settings
class TuneRetrieverSettings:
    """Train the two-tower head."""

    store: Path
    """Item store, made by `lavic embed`: of every target."""
    train: Path
    """Conversations to train on, jsonl; candidate lists are not read."""
    valid: Path
    """Conversations that choose how long to train, jsonl."""
    out: Path
    """The run's folder."""
    tokens: Literal["items", "none"] = "items"
    """What an item is beside its title: its item tokens, or nothing (the titles-only control)."""
    missing: Literal["refuse", "drop"] = "refuse"
    """What happens to a target that is not in the store: an error, or it is left out, counted."""
    max_length: PositiveInt = 1024
    """Maximum length of a conversation, tokens; a longer one loses its middle and keeps its last turn."""
    valid_items: PositiveInt = 100_000
    """Validation searches all targets, and other items sampled from the store up to this number in all."""
    tokens_per_batch: PositiveInt = 8192
    """Tokens of one forward pass of the base model, padding included."""
    model: ModelSettings = ModelSettings()
    """The base model, the one that made the store."""
    head: HeadSettings = HeadSettings()
    """The head and its training."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the run is recorded."""
    nproc: PositiveInt = 1
    """Processes on this machine that compute features; ignored inside torchrun or srun."""


SETTINGS = TuneRetrieverSettings
is_complete = command.is_complete
"""The command's settings, for `lavic.cli.command_module`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    chosen = resolve(argv)
    from lavic.launch.training.retriever_run import run

    return run(chosen, argv)


def resolve(argv: Sequence[str] | None) -> TuneRetrieverSettings:
    """The command's settings from its arguments. Raises ConfigError."""
    chosen = parse(TuneRetrieverSettings, argv, command="tune-retriever", description=DESCRIPTION)
    if chosen.head.folds == 1:
        raise ConfigError("--head.folds 1: a head that leaves out its only fold learns nothing; use 0, or 2 and more")
    return chosen


def estimate(settings: TuneRetrieverSettings) -> str:
    """What the run would take: weights of a process and the features on the disk, one line each."""
    dims = known_dims(settings.model)
    if dims is None:
        return ""
    parts = 2 if settings.tokens == "items" else 1
    conversation, item = (format_bytes(2 * count * dims.hidden) for count in (2, parts))
    return (
        f"features: {conversation} a conversation, {item} an item\n"
        f"{weights_estimate(settings.model, lambda dims: dims.projector + dims.language)}"
    )
