"""Exact and permutation tests of two models on the same conversations, and their adjustment for several tests."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lavic.metrics.bootstrap import cluster_numbers
from lavic.metrics.ranking_metrics import Ratio
from lavic.metrics.relevance import Floats

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Exact test of two models on the same conversations."""

    first_only: int
    """Conversations that only the first model got right."""
    second_only: int
    """Conversations that only the second model got right."""
    p: float
    """Two-sided p value. It takes conversations as independent; the clustered difference does not."""


def mcnemar(first: Sequence[bool] | Floats, second: Sequence[bool] | Floats) -> McNemar:
    """The exact binomial McNemar test on paired hits.

    Args:
        first, second: [n] hit or miss of each model, in the same order.
    """
    a, b = np.asarray(first) == 1, np.asarray(second) == 1
    if a.shape != b.shape:
        raise ValueError(f"the models have {a.size} and {b.size} conversations: a paired test needs the same ones")
    first_only, second_only = int((a & ~b).sum()), int((~a & b).sum())
    n, least = first_only + second_only, min(first_only, second_only)
    tail, num_ways = 0, 1  # num_ways: C(n, wins)
    for wins in range(least + 1):
        tail += num_ways
        num_ways = num_ways * (n - wins) // (wins + 1)
    return McNemar(first_only=first_only, second_only=second_only, p=min(1.0, 2 * tail / 2**n))


def permutation_test(
    first: Ratio, second: Ratio, clusters: NDArray[np.int64], *, draws: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p of the paired permutation test: under the null the two models are exchangeable in each cluster.

    All 2^c exchanges are tried where there are at most `draws` of them, else random ones; then the observed one counts
    as one of the draws, so that p is never 0.

    Args:
        first, second: A metric of two models on the same conversations, with equal denominators.
        clusters: [n] cluster number of each conversation.
        draws: Number of random exchanges.
        seed: Seed of the exchanges.

    Raises:
        ValueError: The two have other conversations.
    """
    if not np.array_equal(first.denominator, second.denominator):
        raise ValueError("a paired test needs the same conversations")
    cluster_sums = np.bincount(cluster_numbers(clusters.tolist()), first.numerator - second.numerator)
    cluster_sums = cluster_sums[np.abs(cluster_sums) > 1e-12]
    observed = abs(float(cluster_sums.sum())) - 1e-9
    if not len(cluster_sums):
        return 1.0
    if 2 ** len(cluster_sums) <= draws:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(cluster_sums))[:, None] >> np.arange(len(cluster_sums))) & 1)
        return float((np.abs(signs @ cluster_sums) >= observed).mean())
    rng = np.random.default_rng(seed)
    chunk, extreme = max(1, 4_000_000 // len(cluster_sums)), 0
    for start in range(0, draws, chunk):
        signs = 1.0 - 2.0 * rng.integers(0, 2, (min(chunk, draws - start), len(cluster_sums)))
        extreme += int((np.abs(signs @ cluster_sums) >= observed).sum())
    return (extreme + 1) / (draws + 1)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's adjustment for multiple tests; the keys keep their order."""
    adjusted: dict[Key, float] = {}
    running = 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        running = max(running, min(1.0, (len(p_values) - rank) * p))
        adjusted[key] = running
    return {key: adjusted[key] for key in p_values}
