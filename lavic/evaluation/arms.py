"""Arms: the model and its controls, each ranking the same lists."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lavic.distributed.context import World
from lavic.evaluation.test_set import Trial

if TYPE_CHECKING:
    from lavic.model.item_store import ItemStore
    from lavic.recommend.ranker import Ranking, Request

Decode = Literal["likelihood", "generate"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of ranking that runs a model."""

    name: str
    bundle: Path
    store: ItemStore
    base: str | None = None
    """Where the bundle's base model is now; None: where the bundle records it."""
    language: bool = True
    """False leaves the language adapter out: the model before stage 2."""
    shuffled: bool = False
    """Each candidate is shown with the tokens of another one of its list."""
    words: Mapping[str, str] | None = None
    """Item -> words in the place of its tokens."""
    tokens_per_item: int | None = None
    """Item tokens shown of each candidate; None: as many as the bundle was tuned on."""


def compete(
    arms: Sequence[Arm],
    trials: Sequence[Trial],
    world: World,
    *,
    decode: Decode = "likelihood",
    tokens_per_batch: int = 8192,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    seed: int = 0,
) -> dict[str, dict[str, list[Ranking]]]:
    """Lets every arm rank every trial. Collective: each rank takes every size-th conversation.

    Arms of the same weights share one loaded model, so order them so that these stand together; no two models are in
    memory at once.

    Args:
        arms: Who ranks.
        trials: What is ranked.
        world: The ranks.
        decode: Rank by likelihood, or let the model write freely.
        tokens_per_batch: Prompts read together; results do not depend on it.
        dtype: Of the weights.
        seed: Of the shuffled arm's derangements.

    Returns:
        Trial name -> arm name -> one ranking per conversation, on every rank.

    Raises:
        DataError: A bundle or a store cannot be used, or not with the other.
    """
    from lavic.model.bundle import Bundle
    from lavic.recommend.ranker import Ranker

    found: dict[str, dict[str, list[Ranking]]] = {trial.name: {} for trial in trials}
    for (folder, base, language), members in groupby(arms, key=lambda arm: (arm.bundle, arm.base, arm.language)):
        bundle = Bundle.load(folder, world.device(), language=language, dtype=dtype, base=base)
        for arm in members:
            ranker = Ranker(bundle, arm.store, tokens_per_batch=tokens_per_batch, tokens_per_item=arm.tokens_per_item)
            for trial in trials:
                progress = _Progress(f"{trial.name}: {arm.name}", len(trial), shown=world.is_main, ranks=world.size)
                requests = [_request(arm, trial, row, seed) for row in range(world.rank, len(trial), world.size)]
                shares = world.gather(ranker.rank(requests, decode=decode, progress=progress.add))
                found[trial.name][arm.name] = [shares[row % world.size][row // world.size] for row in range(len(trial))]
                progress.close()
        del bundle, ranker
        gc.collect()
    return found


def _request(arm: Arm, trial: Trial, row: int, seed: int) -> Request:
    from lavic.recommend.ranker import Request

    return Request(
        conversation=trial.conversations[row],
        candidates=trial.lists[row],
        shown=trial.deranged(row, seed) if arm.shuffled else None,
        looks=arm.words,
    )


class _Progress:
    """A live line in a terminal; in a log one line when done."""

    def __init__(self, name: str, total: int, *, shown: bool, ranks: int) -> None:
        self.name, self.total, self.shown, self.ranks = name, total, shown, ranks
        self.done, self.began = 0, time.monotonic()
        self.live = shown and sys.stderr.isatty()

    def add(self, count: int) -> None:
        self.done += count
        if self.live:
            done = min(self.total, self.done * self.ranks)
            print(f"\r{self.name}: {done:,} of {self.total:,} conversations ", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.shown:
            seconds = time.monotonic() - self.began
            start = "\r" if self.live else ""
            print(f"{start}{self.name}: {self.total:,} conversations in {seconds:.1f} s ", file=sys.stderr, flush=True)
