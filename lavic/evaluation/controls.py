"""The tuned model and its controls, which rank the same lists; each control lacks one of the model's inputs."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lavic.distributed.context import DistributedContext
from lavic.evaluation.test_set import TestSet
from lavic.tracking.progress import progress_bar

if TYPE_CHECKING:
    from lavic.model.item_store import ItemStore
    from lavic.recommend.ranked_list import RankedList
    from lavic.recommend.ranker import Ranker, Request

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
) -> dict[str, dict[str, Sequence[RankedList | None]]]:
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
    rankings: dict[str, dict[str, Sequence[RankedList | None]]] = {test_set.name: {} for test_set in test_sets}
    if not arms:
        return rankings

    from lavic.model.bundle import Bundle
    from lavic.recommend.ranker import Ranker

    for (folder, base, language), members in groupby(arms, key=lambda arm: (arm.bundle, arm.base, arm.language)):
        bundle = Bundle.load(folder, world.device(), language=language, dtype=dtype, base=base)
        for arm in members:
            ranker = Ranker(bundle, arm.store, tokens_per_batch=tokens_per_batch, tokens_per_item=arm.tokens_per_item)
            for test_set in test_sets:
                rankings[test_set.name][arm.name] = _rank(ranker, arm, test_set, world, decode=decode, seed=seed)
        del bundle, ranker
        gc.collect()
    return rankings


def _rank(
    ranker: Ranker, arm: Arm, test_set: TestSet, world: DistributedContext, *, decode: Decode, seed: int
) -> list[RankedList]:
    total = len(test_set)
    requests = [_request(arm, test_set, row, seed) for row in range(world.rank, total, world.size)]
    with progress_bar(total, "conversations", f"{test_set.name}: {arm.name}", shown=world.is_main) as bar:
        shares = world.all_gather_object(
            ranker.rank(
                requests, decode=decode, progress=lambda count: bar.update(min(count * world.size, total - bar.n))
            )
        )
    return [shares[row % world.size][row // world.size] for row in range(total)]


def _request(arm: Arm, test_set: TestSet, row: int, seed: int) -> Request:
    from lavic.recommend.ranker import Request

    return Request(
        conversation=test_set.conversations[row],
        candidates=test_set.lists[row],
        tokens_of=test_set.derangement(row, seed) if arm.shuffled else None,
        texts=arm.words,
    )
