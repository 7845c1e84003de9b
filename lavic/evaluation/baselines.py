"""Baselines without a model: a random order, the list's own order, popularity in training, the last item named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lavic.metrics.ranking_metrics import Floats, Prediction, compute_metrics, expected_random, judge
from lavic.metrics.statistics import Interval
from lavic.recommend.ranked_list import RankedList


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
    """The list as given: its score shows how much the position of the target tells."""
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
    last = {item: float(place) for place, item in enumerate(named, 1)}
    return by_score(candidates, {item: last.get(item, 0.0) for item in candidates})


def count_targets(targets: Iterable[Sequence[str]]) -> Counter[str]:
    """How often each item is a target."""
    return Counter(item for row in targets for item in row)


def random_intervals(
    predictions: Sequence[Prediction], *, draws: int = 2_000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """The random baseline: exact expectations, and the interval that a random order's score falls in.

    A model whose score lies inside that interval is not distinguishable from chance on these conversations.

    Args:
        predictions: One per conversation; their rankings are not used.
        draws: Random orders drawn of every list, for the interval.
        level: Share of the draws inside the interval.
        seed: Seed of the draws.
    """
    judged = judge(
        [replace(prediction, ranking=(), scores=(), confidence=None, answer=None) for prediction in predictions]
    )
    rows, length = len(predictions), judged.relevance.shape[-1]
    # A column per candidate: how often it is a target.
    repeats = np.zeros((rows, length))
    for row, prediction in enumerate(predictions):
        candidates = set(prediction.candidates)
        counts = Counter(item for item in prediction.targets if item in candidates)
        repeats[row, : len(counts)] = list(counts.values())
    is_padding = np.arange(length) >= judged.num_candidates[:, None]
    rng = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // (rows * length))
    scores: dict[str, list[Floats]] = {}
    for start in range(0, draws, chunk):
        keys = rng.random((min(chunk, draws - start), rows, length))
        keys[:, is_padding] = 2.0  # sorts behind the candidates
        order = keys.argsort(axis=-1)
        drawn = np.take_along_axis(np.broadcast_to(repeats, keys.shape), order, axis=-1)
        relevance = (drawn > 0).astype(np.float64)
        shuffled = replace(
            judged,
            relevance=relevance,
            reciprocal_rank=(relevance / np.arange(1, length + 1)).max(-1),
            pair_hits=drawn[..., 0],
            valid=(judged.num_candidates > 0).astype(np.float64),
        )
        for name, ratio in compute_metrics(shuffled).items():
            with np.errstate(invalid="ignore"):
                scores.setdefault(name, []).append(ratio.numerator.sum(-1) / ratio.denominator.sum())
    tail = (1 - level) / 2
    intervals: dict[str, Interval] = {}
    for name, ratio in expected_random(predictions).items():
        low, high = np.quantile(np.concatenate(scores[name]), (tail, 1 - tail))
        n = int(np.count_nonzero(ratio.denominator))
        intervals[name] = Interval(value=ratio.value, low=float(low), high=float(high), n=n)
    return intervals
