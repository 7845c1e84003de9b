"""The tuned model and its controls, which rank the same lists; each control lacks one of the model's inputs."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lavic.distributed.context import DistributedContext
from lavic.evaluation.test_set import TestSet

if TYPE_CHECKING:
    from lavic.model.item_store import ItemStore
    from lavic.recommend.ranker import RankedList, Request

Decode = Literal["likelihood", "generate"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model that ranks: the tuned model, a control, or another bundle."""

    name: str
    bundle: Path
    store: ItemStore
    base: str | None = None
    """Folder or hub id of the base model; None: the one that the bundle records."""
    language: bool = True
    """False for the model without its language adapter, as before stage 2."""
    shuffled: bool = False
    """Give each candidate the item tokens of another candidate of its list."""
    words: Mapping[str, str] | None = None
    """Item -> text that replaces its tokens."""
    tokens_per_item: int | None = None
    """Number of item tokens per candidate; None: as in tuning."""


def rank_test_sets(
    arms: Sequence[Arm],
    test_sets: Sequence[TestSet],
    world: DistributedContext,
    *,
    decode: Decode = "likelihood",
    tokens_per_batch: int = 8192,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    seed: int = 0,
) -> dict[str, dict[str, list[RankedList]]]:
    """Ranks every test set with every arm. Collective: each rank takes every size-th conversation.

    Consecutive arms with the same weights share one loaded model; only one model is in memory at a time.

    Args:
        arms: The models.
        test_sets: The lists to rank.
        world: The ranks.
        decode: Rank by likelihood, or generate text.
        tokens_per_batch: Prompt tokens per batch; results do not depend on it.
        dtype: Of the weights.
        seed: Of the derangements of the shuffled control.

    Returns:
        Test set name -> arm name -> a ranking per conversation, on every rank.

    Raises:
        DataError: A bundle or a store cannot be used, or they do not belong together.
    """
    from lavic.model.bundle import Bundle
    from lavic.recommend.ranker import Ranker

    rankings: dict[str, dict[str, list[RankedList]]] = {test_set.name: {} for test_set in test_sets}
    for (folder, base, language), members in groupby(arms, key=lambda arm: (arm.bundle, arm.base, arm.language)):
        bundle = Bundle.load(folder, world.device(), language=language, dtype=dtype, base=base)
        for arm in members:
            ranker = Ranker(bundle, arm.store, tokens_per_batch=tokens_per_batch, tokens_per_item=arm.tokens_per_item)
            for test_set in test_sets:
                progress = _Progress(
                    f"{test_set.name}: {arm.name}", len(test_set), shown=world.is_main, ranks=world.size
                )
                requests = [_request(arm, test_set, row, seed) for row in range(world.rank, len(test_set), world.size)]
                shares = world.all_gather_object(ranker.rank(requests, decode=decode, progress=progress.add))
                rankings[test_set.name][arm.name] = [
                    shares[row % world.size][row // world.size] for row in range(len(test_set))
                ]
                progress.close()
        del bundle, ranker
        gc.collect()
    return rankings


def _request(arm: Arm, test_set: TestSet, row: int, seed: int) -> Request:
    from lavic.recommend.ranker import Request

    return Request(
        conversation=test_set.conversations[row],
        candidates=test_set.lists[row],
        tokens_of=test_set.derangement(row, seed) if arm.shuffled else None,
        texts=arm.words,
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
