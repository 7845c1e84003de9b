"""What costs nothing: a random pick, the list as given, the item most often right in training."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from lavic.metrics.ranking_metrics import Answer, Floats, Judged, Terms, discounts, ideal_gain, judge, measure
from lavic.metrics.statistics import Interval


def list_order(candidates: Sequence[str]) -> tuple[str, ...]:
    """The list as it came: what always naming the first candidate scores. Tells position bias from skill."""
    return tuple(dict.fromkeys(candidates))


def popularity(candidates: Sequence[str], counts: Counter[str], *, seed: int = 0) -> tuple[str, ...]:
    """Most frequent training target first; equally frequent ones in an order drawn from the seed, not the list's.

    Args:
        candidates: the list to rank.
        counts: how often each item was a target in the training conversations (see `count_targets`).
        seed: of the order among equals.
    """

    def draw(item: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{item}\0{candidates}".encode(), digest_size=8).digest()

    return tuple(sorted(dict.fromkeys(candidates), key=lambda item: (-counts[item], draw(item))))


def count_targets(targets: Iterable[Sequence[str]]) -> Counter[str]:
    """How often each item is a target."""
    return Counter(item for row in targets for item in row)


def expected_random(answers: Sequence[Answer]) -> dict[str, Terms]:
    """The exact expectation of every metric for a random order of each list, conversation by conversation.

    With n candidates of which m are targets: the first is right with probability m / n; each rank is equally likely to
    hold a target; the first target stands at rank j with probability C(n - j, m - 1) / C(n, m).
    """
    judged = judge(answers)
    n = np.maximum(judged.offered, 1).astype(np.float64)
    share = judged.reachable / n
    in_list = (judged.reachable > 0).astype(np.float64)
    ones = np.ones(len(n))

    def recall(k: int) -> Floats:
        return share * np.minimum(k, n) / judged.targets

    def ndcg(k: int) -> Floats:
        cumulative = np.concatenate([[0.0], np.cumsum(discounts(k))])
        return share * cumulative[np.minimum(k, judged.offered)] / ideal_gain(judged.targets, k)

    def reciprocal(offered: int, reachable: int) -> float:
        if not reachable:
            return 0.0
        lists = math.comb(offered, reachable)
        last = offered - reachable + 1
        return sum(math.comb(offered - j, reachable - 1) / lists / j for j in range(1, last + 1))

    mrr = np.array([reciprocal(int(a), int(b)) for a, b in zip(judged.offered, judged.reachable, strict=True)])
    return {
        "hit_rate": Terms(share, ones),
        "hit_rate_in_list": Terms(share, in_list),
        "released_recall_at_1": Terms(share, judged.targets.astype(np.float64)),
        "recall_at_3": Terms(recall(3), ones),
        "recall_at_5": Terms(recall(5), ones),
        "mrr": Terms(mrr, ones),
        "ndcg_at_5": Terms(ndcg(5), ones),
        "ndcg_at_10": Terms(ndcg(10), ones),
        "valid_ratio": Terms((judged.offered > 0).astype(np.float64), ones),
    }


def random_intervals(
    answers: Sequence[Answer], *, draws: int = 2_000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """The random arm: exact expectations, with the range a random picker's score falls in on these conversations.

    An arm whose value lies inside that range cannot be told from guessing on this many conversations.

    Args:
        answers: one per conversation; their rankings are not looked at.
        draws: random orders drawn of every list, for the range.
        level: share of the draws inside the range.
        seed: of the draws.
    """
    judged = judge(answers)
    rows, width = len(answers), judged.relevance.shape[-1]
    listed = np.arange(width) < judged.reachable[:, None]
    absent = np.arange(width) >= judged.offered[:, None]
    rng = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // (rows * width))
    scores: dict[str, list[Floats]] = {}
    for start in range(0, draws, chunk):
        keys = rng.random((min(chunk, draws - start), rows, width))
        keys[:, absent] = 2.0  # beyond the end of a short list: always last
        order = keys.argsort(axis=-1)
        relevance = np.take_along_axis(np.broadcast_to(listed, keys.shape), order, axis=-1)
        drawn = Judged(
            relevance=relevance,
            valid=judged.offered > 0,
            targets=judged.targets,
            reachable=judged.reachable,
            offered=judged.offered,
        )
        for name, terms in measure(drawn).items():
            with np.errstate(invalid="ignore"):
                scores.setdefault(name, []).append(terms.numerator.sum(-1) / terms.denominator.sum())
    tail = (1 - level) / 2
    result: dict[str, Interval] = {}
    for name, terms in expected_random(answers).items():
        low, high = np.quantile(np.concatenate(scores[name]), (tail, 1 - tail))
        n = int(np.count_nonzero(terms.denominator))
        result[name] = Interval(value=terms.value, low=float(low), high=float(high), n=n)
    return result
