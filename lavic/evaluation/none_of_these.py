"""Lists that lack the right answer: how well "none of these" tells them from the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lavic.evaluation.test_set import Trial

if TYPE_CHECKING:
    from lavic.recommend.ranker import Ranking


def judge_none(trial: Trial, rankings: Sequence[Ranking]) -> dict[str, float | int | None] | None:
    """What a model that can say "none of these" says of lists with and without a target.

    Returns:
        `lists_without`: lists that hold no target, and `said_none_without`: the share of them that were told so;
        `lists_with`, and `said_none_with`: the share that were wrongly told so; `auc`: the probability that a list
        without a target gets more probability on "none" than one with (ties half). Shares of no lists are None. None
        where the model has no such answer.
    """
    if any(ranking.none is None for ranking in rankings):
        return None
    groups: dict[bool, list[tuple[float, bool]]] = {True: [], False: []}
    for conversation, listed, ranking in zip(trial.conversations, trial.lists, rankings, strict=True):
        none = ranking.none or 0.0
        said = none > (1 - none) * max(ranking.probabilities, default=0.0)  # those are normalised without it
        groups[bool(set(conversation.targets) & set(listed))].append((none, said))
    absent, present = groups[False], groups[True]
    pairs = len(absent) * len(present)
    wins = sum((a > p) + 0.5 * (a == p) for a, _ in absent for p, _ in present)
    return {
        "lists_without": len(absent),
        "lists_with": len(present),
        "said_none_without": _share(absent),
        "said_none_with": _share(present),
        "auc": wins / pairs if pairs else None,
    }


def _share(group: Sequence[tuple[float, bool]]) -> float | None:
    return sum(said for _, said in group) / len(group) if group else None
