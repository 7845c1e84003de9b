"""Baselines without a model: a random order, the list's own order, the popularity in training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from lavic.metrics.ranking_metrics import Floats, Prediction, compute_metrics, expected_random, judge
from lavic.metrics.statistics import Interval


def list_order(candidates: Sequence[str]) -> tuple[str, ...]:
    """The list as given: its score shows how much the position of the target tells."""
    return tuple(dict.fromkeys(candidates))


def popularity(candidates: Sequence[str], counts: Counter[str], *, seed: int = 0) -> tuple[str, ...]:
    """The most frequent training target first; ties in a random order that does not depend on the list's.

    Args:
        candidates: The list to rank.
        counts: How often each item is a target in training (see `count_targets`).
        seed: Seed of the order of ties.
    """

    def draw(item: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{item}\0{candidates}".encode(), digest_size=8).digest()

    return tuple(sorted(dict.fromkeys(candidates), key=lambda item: (-counts[item], draw(item))))


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
    judged = judge(predictions)
    rows, length = len(predictions), judged.relevance.shape[-1]
    is_target = np.arange(length) < judged.num_listed[:, None]
    is_padding = np.arange(length) >= judged.num_candidates[:, None]
    rng = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // (rows * length))
    scores: dict[str, list[Floats]] = {}
    for start in range(0, draws, chunk):
        keys = rng.random((min(chunk, draws - start), rows, length))
        keys[:, is_padding] = 2.0  # sorts behind the candidates
        order = keys.argsort(axis=-1)
        relevance = np.take_along_axis(np.broadcast_to(is_target, keys.shape), order, axis=-1)
        shuffled = replace(judged, relevance=relevance, valid=judged.num_candidates > 0)
        for name, ratio in compute_metrics(shuffled).items():
            with np.errstate(invalid="ignore"):
                scores.setdefault(name, []).append(ratio.numerator.sum(-1) / ratio.denominator.sum())
    tail = (1 - level) / 2
    intervals: dict[str, Interval] = {}
    for name, ratio in expected_random(judged).items():
        low, high = np.quantile(np.concatenate(scores[name]), (tail, 1 - tail))
        n = int(np.count_nonzero(ratio.denominator))
        intervals[name] = Interval(value=ratio.value, low=float(low), high=float(high), n=n)
    return intervals
