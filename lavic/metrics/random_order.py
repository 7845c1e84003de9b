"""A random order of each list: the exact expectation of every metric, and the range that its scores fall in.

All that a metric depends on is where the listed targets stand. Their expected share of each rank has a closed form; for
the range only their ranks are drawn, so that the length of the lists costs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lavic.metrics.bootstrap import Interval
from lavic.metrics.ranking_metrics import NDCG_AT, RECALL_AT, Ratio, compute_metrics
from lavic.metrics.relevance import Floats, Prediction, Relevance, expected_reciprocal_rank

DEPTH = max(*RECALL_AT, *NDCG_AT)
"""Ranks that a metric looks at, but MRR, which looks at all."""
_CHUNK = 1_000_000
"""Ranks that are drawn together."""

Ints = NDArray[np.int64]


class RandomOrders:
    """Random orders of the lists of some predictions, whose rankings are not used."""

    def __init__(self, predictions: Sequence[Prediction]) -> None:
        sizes, targets, pairs, rows, repeats = [], [], [], [], []
        for row, prediction in enumerate(predictions):
            candidates, counts = set(prediction.candidates), Counter(prediction.targets)
            sizes.append(len(candidates))
            targets.append(len(counts))
            pairs.append(len(prediction.targets))
            for target in candidates.intersection(counts):
                rows.append(row)
                repeats.append(counts[target])
        self._sizes, self._targets, self._pairs = (
            np.array(column, dtype=np.int64) for column in (sizes, targets, pairs)
        )
        # Of each listed target: its conversation, and how often that has it.
        self._rows, self._repeats = (np.array(column, dtype=np.int64) for column in (rows, repeats))
        self._listed = np.bincount(self._rows, minlength=len(sizes))

    def expectation(self) -> dict[str, Ratio]:
        """The exact expectation of every metric."""
        share = self._listed / np.maximum(self._sizes, 1)
        kinds, kind_of = np.unique(np.stack([self._sizes, self._listed]), axis=1, return_inverse=True)
        reciprocal = np.array([expected_reciprocal_rank(0, size, hits) for size, hits in kinds.T.tolist()])
        pair_share = np.bincount(self._rows, self._repeats, minlength=len(self._sizes)) / np.maximum(self._sizes, 1)
        return compute_metrics(
            self._relevance(
                np.where(np.arange(DEPTH) < self._sizes[:, None], share[:, None], 0.0),
                reciprocal_rank=reciprocal[kind_of.ravel()],
                pair_hits=pair_share,
            )
        )

    def intervals(self, *, draws: int = 2_000, level: float = 0.95, seed: int = 0) -> dict[str, Interval]:
        """The exact expectations, and the interval that a random order's score falls in.

        A model whose score lies inside that interval is not distinguishable from chance on these conversations.

        Args:
            draws: Random orders drawn of every list.
            level: Share of the draws inside the interval.
            seed: Seed of the draws.
        """
        drawn_sums = self._drawn_sums(draws, np.random.default_rng(seed))
        tail = (1 - level) / 2
        intervals = {}
        for name, ratio in self.expectation().items():
            total = float(ratio.denominator.sum())
            # The share of valid items is the same in every order.
            scores = drawn_sums[name] if name in drawn_sums else np.full(draws, ratio.numerator.sum())
            low, high = np.quantile(scores, (tail, 1 - tail)) / total if total else (np.nan, np.nan)
            n = int(np.count_nonzero(ratio.denominator))
            intervals[name] = Interval(value=ratio.value, low=float(low), high=float(high), n=n)
        return intervals

    def _drawn_sums(self, draws: int, rng: np.random.Generator) -> dict[str, Floats]:
        """[draws] the sum over conversations of each metric, in random orders."""
        kinds, kind_of = np.unique(np.stack([self._targets[self._rows], self._repeats]), axis=1, return_inverse=True)
        num_ranks = DEPTH + 1  # the last one: any rank behind
        longest = int(self._sizes.max())
        counts = np.zeros((draws, kinds.shape[1] * num_ranks))
        first_rank_counts = np.zeros((draws, longest))
        for num_listed in np.unique(self._listed[self._listed > 0]).tolist():
            members = np.flatnonzero(self._listed == num_listed)
            offsets = num_ranks * kind_of.ravel()[np.isin(self._rows, members)].reshape(len(members), num_listed)
            step = max(1, _CHUNK // offsets.size)
            for start in range(0, draws, step):
                size = min(step, draws - start)
                ranks = _distinct_ranks(self._sizes[members], num_listed, size, rng)
                counts[start : start + size] += _histogram(np.minimum(ranks, DEPTH) + offsets, counts.shape[1])
                first_rank_counts[start : start + size] += _histogram(ranks.min(-1), longest)
        metric_sums = {name: counts @ numerator for name, numerator in _by_rank(*kinds).items()}
        metric_sums["mrr"] = first_rank_counts @ (1.0 / np.arange(1, longest + 1))
        return metric_sums

    def _relevance(self, relevance: Floats, *, reciprocal_rank: Floats, pair_hits: Floats) -> Relevance:
        unknown = np.full(len(self._sizes), np.nan)
        return Relevance(
            relevance=relevance,
            reciprocal_rank=reciprocal_rank,
            pair_hits=pair_hits,
            valid=(self._sizes > 0).astype(np.float64),
            valid_answer=unknown,
            confidence=unknown,
            num_pairs=self._pairs,
            num_targets=self._targets,
            num_listed=self._listed,
        )


def _by_rank(targets: Ints, repeats: Ints) -> dict[str, Floats]:
    """What a target adds to each metric at each rank: [kinds * (DEPTH + 1)], 0 at the last one.

    Args:
        targets: [kinds] distinct targets of its conversation.
        repeats: [kinds] how often it is among them.
    """
    count = len(targets)
    relevance = np.tile(np.eye(DEPTH + 1, DEPTH), (count, 1))
    repeated = np.repeat(np.stack([targets, repeats]), DEPTH + 1, axis=1)
    ones, unknown = np.ones(relevance.shape[0], dtype=np.int64), np.full(relevance.shape[0], np.nan)
    metrics = compute_metrics(
        Relevance(
            relevance=relevance,
            reciprocal_rank=unknown,
            pair_hits=repeated[1] * relevance[:, 0],
            valid=unknown,
            valid_answer=unknown,
            confidence=unknown,
            num_pairs=ones,
            num_targets=repeated[0],
            num_listed=ones,
        )
    )
    return {name: ratio.numerator for name, ratio in metrics.items() if name != "valid_ratio"}


def _distinct_ranks(sizes: Ints, num_listed: int, draws: int, rng: np.random.Generator) -> Ints:
    """[draws, n, num_listed] ranks from 0 of the listed targets in random orders of lists of these sizes."""
    ranks = np.empty((draws, len(sizes), num_listed), dtype=np.int64)
    for number in range(num_listed):
        rank = (rng.random((draws, len(sizes))) * (sizes - number)).astype(np.int64)
        # Drawn among the ranks that are left: a rank moves behind each taken one that it reaches, the first one first.
        for taken_ranks in np.moveaxis(np.sort(ranks[..., :number], axis=-1), -1, 0):
            rank += rank >= taken_ranks
        ranks[..., number] = rank
    return ranks


def _histogram(values: Ints, bins: int) -> Ints:
    """[draws, bins] how often each value from 0 is in each draw; values are [draws, ...]."""
    draws = len(values)
    rows = bins * np.arange(draws).reshape(-1, *[1] * (values.ndim - 1))
    return np.bincount((values + rows).ravel(), minlength=draws * bins).reshape(draws, bins)
