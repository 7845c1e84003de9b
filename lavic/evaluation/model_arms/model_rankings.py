"""The rankings of a test set's lists by models, each rank taking its share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError
from lavic.evaluation.model_arms.arms import Arm
from lavic.evaluation.model_arms.list_orders import average, reordered
from lavic.evaluation.saved_rankings import ArmRankings, SavedRankings
from lavic.evaluation.test_set import TestSet
from lavic.tracking.progress import progress_bar

if TYPE_CHECKING:
    from lavic.model.bundle import Bundle
    from lavic.recommend.ranking.ranked_list import RankedList
    from lavic.recommend.ranking.request import Request
    from lavic.recommend.ranking.token_source import TokenSource

Decode = Literal["likelihood", "generate"]


@dataclass(frozen=True, kw_only=True)
class ModelRankings:
    """The rankings of all arms that use a model."""

    rankings: dict[str, dict[str, Sequence[RankedList | None]]]
    """Test set -> arm -> a ranking per conversation: of the lists in the file's order, or averaged over orders."""
    orders: dict[str, dict[str, list[list[RankedList]]]]
    """Test set -> arm -> for each order a ranking per conversation; empty where there is one order."""
    groups: dict[str, dict[str, int | str]]
    """Arm -> how its lists were ranked in groups, see `GroupSize`."""


def rank_test_sets(
    arms: Sequence[Arm],
    test_sets: Sequence[TestSet],
    world: DistributedContext,
    *,
    decode: Decode = "likelihood",
    tokens_per_batch: int = 8192,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    seed: int = 0,
    orders: int = 1,
    averaged: bool = False,
    saved: SavedRankings | None = None,
) -> ModelRankings:
    """Ranks every test set with every arm. Collective: each rank takes every size-th conversation.

    Consecutive arms with the same weights share one loaded model; only one model is in memory at a time.

    Args:
        arms: The models.
        test_sets: The lists to rank.
        world: The ranks.
        decode: Rank by likelihood, or generate text.
        tokens_per_batch: Prompt tokens per batch; results do not depend on it.
        dtype: Of the weights.
        seed: Of shuffled lists, shuffled tokens and noise.
        orders: In how many orders each list is ranked; the first is the file's.
        averaged: Average the probabilities over the orders.
        saved: Rankings of a run that did not finish; those made here are added.

    Raises:
        ConfigError: Too few photos fit into the context.
        DataError: A bundle or a store cannot be used, or they do not belong together; or a photo is missing.
    """
    ranked = ModelRankings(
        rankings={test_set.name: {} for test_set in test_sets},
        orders={test_set.name: {} for test_set in test_sets},
        groups={},
    )
    saved = saved or SavedRankings(None)
    for _, group in groupby(arms, key=lambda arm: arm.weights):
        bundle: Bundle | None = None
        for arm in group:
            for test_set in test_sets:
                inputs = {
                    **arm.inputs(),
                    "test_set": test_set.digest,
                    "decode": decode,
                    "seed": seed,
                    "orders": orders,
                    "dtype": dtype,
                    "device": world.device().type,
                }
                # Rank 0 alone reads and writes them: the ranks may have no folder in common.
                arm_rankings = world.broadcast_object(saved.get(inputs) if world.is_main else None)
                if arm_rankings is None:
                    if bundle is None:
                        bundle = _load(arm, world, dtype)
                    rank, size = _rank_function(arm, bundle, test_set, tokens_per_batch, decode, seed)
                    lists = [_rank(rank, arm, test_set, world, number, seed) for number in range(orders)]
                    arm_rankings = ArmRankings(orders=lists, group=size)
                    if world.is_main:
                        saved.put(inputs, arm_rankings)
                    del rank
                _add(ranked, arm.name, test_set.name, arm_rankings, averaged)
        if bundle is not None:
            del bundle
            gc.collect()
    return ranked


def _add(ranked: ModelRankings, arm: str, test_set: str, arm_rankings: ArmRankings, averaged: bool) -> None:
    rows = zip(*arm_rankings.orders, strict=True)
    ranked.rankings[test_set][arm] = [average(row) for row in rows] if averaged else arm_rankings.orders[0]
    if len(arm_rankings.orders) > 1:
        ranked.orders[test_set][arm] = arm_rankings.orders
    if arm_rankings.group is not None:
        ranked.groups[arm] = arm_rankings.group


def _load(arm: Arm, world: DistributedContext, dtype: Literal["auto", "float32", "bfloat16"]) -> Bundle:
    from lavic.model.bundle import Bundle

    photos = arm.shown == "photos"
    return Bundle.load(
        arm.bundle,
        world.device(),
        vision=photos,
        language=arm.language,
        adapted=not photos,
        dtype=dtype,
        base=arm.base,
    )


RankFunction = Callable[["Sequence[Request]", Callable[[int], None]], "list[RankedList]"]


def _rank_function(
    arm: Arm, bundle: Bundle, test_set: TestSet, tokens_per_batch: int, decode: Decode, seed: int
) -> tuple[RankFunction, dict[str, int | str] | None]:
    """How an arm ranks requests; and the size of the groups, where it ranks in groups."""
    from lavic.evaluation.model_arms.photo_tokens import GroupSize, PhotoTokens, rank_in_groups
    from lavic.recommend.ranking.ranker import Ranker

    if arm.shown == "photos":
        assert arm.photo is not None, "the setup gives it"
        size = GroupSize.of(bundle, arm.context)
        photos = PhotoTokens(bundle.backbone, arm.photo)
        ranker = Ranker(bundle, arm.store, tokens_per_batch=tokens_per_batch, tokens=photos, max_length=size.context)
        if decode == "likelihood":
            return lambda requests, progress: rank_in_groups(ranker, requests, size.size, progress), asdict(size)
        if (longest := max(map(len, test_set.lists))) > size.size:
            raise ConfigError(
                f"--arms base_photos with --decode generate: {size.size} candidates fit into a prompt, a list of "
                f"{test_set.name} has {longest}, and groups need likelihoods: use --decode likelihood"
            )
        return lambda requests, progress: ranker.rank(requests, decode=decode, progress=progress), asdict(size)
    ranker = Ranker(
        bundle,
        arm.store,
        tokens_per_batch=tokens_per_batch,
        tokens_per_item=arm.tokens_per_item,
        tokens=_replaced_tokens(arm, bundle, test_set, seed),
    )
    return lambda requests, progress: ranker.rank(requests, decode=decode, progress=progress), None


def _replaced_tokens(arm: Arm, bundle: Bundle, test_set: TestSet, seed: int) -> TokenSource | None:
    """What an arm shows instead of the store's item tokens."""
    from lavic.evaluation.model_arms.control_tokens import BlankTokens, NoiseTokens

    max_tokens = arm.tokens_per_item or bundle.info.tokens_per_item
    if arm.shown == "blank":
        return BlankTokens(bundle.backbone.model, arm.store, max_tokens, test_set.items)
    if arm.shown == "noise":
        return NoiseTokens(bundle.backbone.model, arm.store, max_tokens, test_set.items, seed)
    return None


def _rank(
    rank: RankFunction, arm: Arm, test_set: TestSet, world: DistributedContext, number: int, seed: int
) -> list[RankedList]:
    """The rankings of a test set's lists in one order."""
    total = len(test_set)
    requests = [_request(arm, test_set, row, number, seed) for row in range(world.rank, total, world.size)]
    title = f"{test_set.name}: {arm.name}" + (f", order {number + 1}" if number else "")
    with progress_bar(total, "conversations", title, shown=world.is_main) as bar:
        shares = world.all_gather_object(
            rank(requests, lambda count: bar.update(min(count * world.size, total - bar.n)))
        )
    return [shares[row % world.size][row // world.size] for row in range(total)]


def _request(arm: Arm, test_set: TestSet, row: int, number: int, seed: int) -> Request:
    from lavic.recommend.ranking.request import Request

    return Request(
        conversation=test_set.conversations[row],
        candidates=reordered(test_set, row, number, seed),
        tokens_of=test_set.derangement(row, seed) if arm.shown == "shuffled" else None,
        texts=arm.texts if arm.shown == "text" else None,
    )
