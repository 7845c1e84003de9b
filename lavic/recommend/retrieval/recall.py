"""How many of the targets are in the lists, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lavic.data.schema import Conversation
from lavic.metrics.bootstrap import Bootstrap, Interval, connected_clusters
from lavic.metrics.ranking_metrics import Ratio

CUTS = (1, 10, 50, 100)
"""Lengths of lists at which recall is computed."""


def recall(
    conversations: Sequence[Conversation],
    lists: Mapping[str, Sequence[Sequence[str]]],
    *,
    cuts: Sequence[int] = CUTS,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """Share of a conversation's targets in the first k of its list, averaged over the conversations with a target.

    Intervals are of a bootstrap over clusters of conversations that share a submission or a target.

    Args:
        lists: For each method a list of ids for each conversation.

    Returns:
        For each method `recall_at_<k>`; nothing if no conversation has a target.
    """
    scored = [row for row, conversation in enumerate(conversations) if conversation.targets]
    if not scored:
        return {}
    keys = [_keys(conversations[row]) for row in scored]
    bootstrap = Bootstrap(connected_clusters(keys), draws=draws, level=level, seed=seed)
    ones = np.ones(len(scored))
    ratios = {
        (method, k): Ratio(np.array([_share(conversations[row].targets, ids[row][:k]) for row in scored]), ones)
        for method, ids in lists.items()
        for k in cuts
    }
    intervals = bootstrap.intervals(ratios)
    return {method: {f"recall_at_{k}": intervals[method, k] for k in cuts} for method in lists}


def _keys(conversation: Conversation) -> set[tuple[str, str]]:
    """What makes conversations dependent."""
    first = conversation.turns[0].text if conversation.turns else ""
    submission = {("submission", " ".join(first.lower().split()))} if first else set()
    return submission | {("target", id) for id in conversation.targets}


def _share(targets: Sequence[str], ids: Sequence[str]) -> float:
    distinct_targets = set(targets)
    return len(distinct_targets & set(ids)) / len(distinct_targets)
