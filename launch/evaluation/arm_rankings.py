"""The rankings of all arms: models, other systems' files, baselines without a model, a chat model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lavic.distributed.context import DistributedContext
from lavic.endpoint.client import Endpoint
from lavic.errors import LavicError, Stopped
from lavic.evaluation.assessment import RANDOM
from lavic.evaluation.baselines import list_order, popularity, repeat_last
from lavic.evaluation.chat import ChatArm, run_chat
from lavic.evaluation.model_arms.model_rankings import ModelRankings, rank_test_sets
from lavic.evaluation.saved_rankings import ArmRankings, SavedRankings
from lavic.evaluation.test_set import TestSet
from lavic.evaluation.text_arms import rank_bm25, rank_dense
from lavic.recommend.retrieval.vectors.sentence_encoder import dense_settings

if TYPE_CHECKING:
    from lavic.launch.evaluation.settings import EvaluateSettings
    from lavic.launch.evaluation.setup.evaluation_setup import EvaluationSetup
    from lavic.recommend.ranking.ranked_list import RankedList

    Rankings = dict[str, dict[str, Sequence[RankedList | None]]]
    """Test set -> arm -> a ranking per conversation, None where the arm has none."""


@dataclass(frozen=True, kw_only=True)
class AllRankings:
    """What the arms have ranked."""

    rankings: Rankings
    models: ModelRankings
    """The rankings by models, with all orders of the lists."""
    chat: ChatArm | None
    failed: dict[str, LavicError]
    """The arms that did not run, and why."""


def rank_arms(
    chosen: EvaluateSettings, setup: EvaluationSetup, world: DistributedContext, saved: SavedRankings
) -> AllRankings | None:
    """Ranks every test set with every arm. Collective; None on every rank but 0.

    An arm without a model that fails does not stop the others.

    Raises:
        LavicError: A model cannot rank, or no arm has run.
    """
    models = rank_test_sets(
        setup.arms,
        setup.test_sets,
        world,
        decode=chosen.decode,
        tokens_per_batch=chosen.tokens_per_batch,
        dtype=chosen.dtype,
        seed=chosen.seed,
        orders=chosen.orders,
        averaged=chosen.average_orders,
        saved=saved,
    )
    if not world.is_main:
        return None
    rankings: Rankings = {name: dict(by_arm) for name, by_arm in models.rankings.items()}
    for name, other in setup.runs.items():
        rankings[other.test_set][name] = other.rankings
    chat, failed = None, dict[str, LavicError]()
    ranked: Mapping[str, Sequence[RankedList | None]]
    for arm in setup.text_arms:
        try:
            if arm == "chat":
                chat = _ask_chat_model(chosen, setup)
                ranked = chat.rankings
            else:
                ranked = {s.name: _rank_text_arm(arm, s, setup, chosen, saved) for s in setup.test_sets}
        except Stopped:
            raise
        except LavicError as error:
            failed[arm] = error
            continue
        for name, rows in ranked.items():
            rankings[name][arm] = rows
    if failed and not set(setup.names) - {RANDOM, *failed}:
        raise next(iter(failed.values()))
    return AllRankings(rankings=rankings, models=models, chat=chat, failed=failed)


def _ask_chat_model(chosen: EvaluateSettings, setup: EvaluationSetup) -> ChatArm:
    """The answers of the arm `chat`; they are kept in --chat.cache, by default OUT/answers."""
    settings = replace(chosen.chat, cache=chosen.chat.cache or chosen.out / "answers")
    with Endpoint(settings, "--chat") as endpoint:
        return run_chat(setup.test_sets, settings, endpoint, setup.text, setup.photo)


def _rank_text_arm(
    arm: str, test_set: TestSet, setup: EvaluationSetup, chosen: EvaluateSettings, saved: SavedRankings
) -> list[RankedList]:
    """The rankings of an arm that needs no bundle."""
    inputs: dict[str, Any] = {"arm": arm, "test_set": test_set.digest}
    if arm in ("bm25", "dense"):
        inputs["texts"] = dict(setup.texts)
    if arm == "dense":
        inputs["dense"] = dense_settings(chosen.dense)
    if arm == "popularity":
        inputs["target_counts"] = setup.target_counts
    if (arm_rankings := saved.get(inputs)) is None:
        arm_rankings = ArmRankings(orders=[_ranked_by(arm, test_set, setup, chosen)])
        saved.put(inputs, arm_rankings)
    return arm_rankings.orders[0]


def _ranked_by(arm: str, test_set: TestSet, setup: EvaluationSetup, chosen: EvaluateSettings) -> list[RankedList]:
    if arm == "bm25":
        return rank_bm25(test_set, setup.texts)
    if arm == "dense":
        return rank_dense(test_set, setup.texts, chosen.dense)
    if arm == "popularity":
        return [popularity(listed, setup.target_counts or {}) for listed in test_set.lists]
    if arm == "repeat_last":
        pairs = zip(test_set.conversations, test_set.lists, strict=True)
        return [repeat_last(listed, conversation.context_items) for conversation, listed in pairs]
    return [list_order(listed) for listed in test_set.lists]
