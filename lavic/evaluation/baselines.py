"""Baselines without a model: the list's own order, popularity in training, the last item named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lavic.recommend.ranking.ranked_list import RankedList


def by_score(candidates: Sequence[str], scores: Mapping[str, float]) -> RankedList:
    """The candidates in the order of their scores; equal scores stay ties.

    Args:
        candidates: The list to rank; repeats count once.
        scores: Item -> score; an item that is not in it has the lowest score of all.
    """
    items = list(dict.fromkeys(candidates))
    lowest = min(scores.values(), default=0.0) - 1.0
    ranked = sorted(((scores.get(item, lowest), item) for item in items), key=lambda pair: -pair[0])
    return RankedList(ids=tuple(item for _, item in ranked), scores=tuple(float(score) for score, _ in ranked))


def list_order(candidates: Sequence[str]) -> RankedList:
    """The list as given: its score shows how informative the position of the target is."""
    return RankedList(ids=tuple(dict.fromkeys(candidates)))


def popularity(candidates: Sequence[str], counts: Mapping[str, int]) -> RankedList:
    """The most frequent training target first.

    Args:
        candidates: The list to rank.
        counts: How often each item is a target in training (see `count_targets`).
    """
    return by_score(candidates, {item: float(counts.get(item, 0)) for item in candidates})


def repeat_last(candidates: Sequence[str], named: Sequence[str]) -> RankedList:
    """The items that the conversation has already named first, the last one before all others.

    Args:
        candidates: The list to rank.
        named: The named items, the oldest first. Items that are not among them are tied.
    """
    last_position = {item: float(position) for position, item in enumerate(named, 1)}
    return by_score(candidates, {item: last_position.get(item, 0.0) for item in candidates})


def count_targets(targets: Iterable[Sequence[str]]) -> Counter[str]:
    """How often each item is a target."""
    return Counter(item for row in targets for item in row)
