"""How well the answer "none of these" detects candidate lists without a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lavic.evaluation.test_set import TestSet

if TYPE_CHECKING:
    from lavic.recommend.ranking.ranked_list import RankedList


def none_of_these_metrics(
    test_set: TestSet, rankings: Sequence[RankedList | None]
) -> dict[str, float | int | None] | None:
    """How often a model answers "none of these" for lists with and without a target.

    Returns:
        `lists_without`: lists without a target, and `said_none_without`: the share of them with the answer "none of
        these"; `lists_with` and `said_none_with`: the same for lists with a target, where the answer is wrong; `auc`:
        the probability that a list without a target gets more probability of "none" than one with (ties half). A share
        of no lists is None. Empty lists, about which no model is asked, do not count. None for a model without this
        answer.
    """
    groups: dict[bool, list[tuple[float, bool]]] = {True: [], False: []}
    for conversation, candidates, ranking in zip(test_set.conversations, test_set.lists, rankings, strict=True):
        if not candidates:
            continue
        if ranking is None or ranking.none is None:
            return None
        none = ranking.none
        answered_none = none > (1 - none) * max(ranking.probabilities, default=0.0)  # normalized without "none"
        groups[bool(set(conversation.targets) & set(candidates))].append((none, answered_none))
    without, present = groups[False], groups[True]
    pairs = len(without) * len(present)
    none_scores_without, none_scores_with = (
        np.array([none for none, _ in without]),
        np.sort([none for none, _ in present]),
    )
    wins = sum(
        float(np.searchsorted(none_scores_with, none_scores_without, side).sum()) / 2 for side in ("left", "right")
    )
    return {
        "lists_without": len(without),
        "lists_with": len(present),
        "said_none_without": _share(without),
        "said_none_with": _share(present),
        "auc": wins / pairs if pairs else None,
    }


def _share(group: Sequence[tuple[float, bool]]) -> float | None:
    return sum(answered_none for _, answered_none in group) / len(group) if group else None
