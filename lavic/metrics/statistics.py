"""How sure: intervals, differences and tests that respect that conversations are not independent.

In the released data a quarter of the test rows share their submission with another row, and popular items are targets
many times over. Rows that share either are resampled together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lavic.metrics.ranking_metrics import Floats, Terms

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and the range that holds it with the level asked for."""

    value: float
    low: float
    high: float
    n: int
    """How many conversations it rests on."""
    clusters: int | None = None
    """How many independent groups of conversations; None where the question does not arise."""

    def as_dict(self) -> dict[str, float | int]:
        """The form of `results.json`: value, low, high, n, and clusters where known."""
        form: dict[str, float | int] = {"value": self.value, "low": self.low, "high": self.high, "n": self.n}
        return form if self.clusters is None else {**form, "clusters": self.clusters}


def connect(keys: Sequence[Iterable[Hashable]]) -> NDArray[np.int64]:
    """Number the groups of rows that share a key, directly or through others.

    Args:
        keys: for each row the things it stands on, such as its submission and its targets.

    Returns:
        [n] group numbers from 0, in order of first appearance.
    """
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    seen: dict[Hashable, int] = {}
    for row, own in enumerate(keys):
        for key in own:
            a, b = root(row), root(seen.setdefault(key, row))
            parent[max(a, b)] = min(a, b)
    return number(root(row) for row in range(len(keys)))


def number(labels: Iterable[Hashable]) -> NDArray[np.int64]:
    """Any labels as integers from 0, in order of first appearance."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels], dtype=np.int64)


class Bootstrap:
    """Percentile cluster bootstrap of ratios of sums.

    Clusters are drawn with replacement; the same seed draws the same clusters every time, so intervals of several
    metrics, and differences of several arms over the same conversations, rest on the same draws (paired).

    Args:
        clusters: [n] group number of each conversation (see `connect`).
        draws: resamples.
        level: the interval's level.
        seed: of the draws.
    """

    def __init__(self, clusters: NDArray[np.int64], *, draws: int = 10_000, level: float = 0.95, seed: int = 0):
        if len(clusters) == 0:
            raise ValueError("a bootstrap needs at least one conversation")
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, not {level}")
        self.clusters = number(clusters.tolist())
        self.count = int(self.clusters.max()) + 1
        self.draws, self.level, self.seed = draws, level, seed

    def intervals(self, metrics: Mapping[Key, Terms]) -> dict[Key, Interval]:
        """The value and interval of each metric.

        Where every conversation agrees (all right or all wrong) resampling shows no spread; there the exact binomial
        bound over clusters is given instead, so that 1.0 never claims to be certain.
        """
        numerators, denominators = self._resample(metrics)
        result: dict[Key, Interval] = {}
        for column, (key, terms) in enumerate(metrics.items()):
            low, high = self._range(numerators[:, column], denominators[:, column])
            bound = ((1 - self.level) / 2) ** (1 / self.count)
            if terms.denominator.any() and not terms.numerator.any():
                low, high = 0.0, 1 - bound
            elif terms.denominator.any() and np.array_equal(terms.numerator, terms.denominator):
                low, high = bound, 1.0
            n = int(np.count_nonzero(terms.denominator))
            result[key] = Interval(value=terms.value, low=low, high=high, n=n, clusters=self.count)
        return result

    def differences(self, first: Mapping[Key, Terms], second: Mapping[Key, Terms]) -> dict[Key, Interval]:
        """`first - second` for each metric both have, paired: both arms are resampled with the same clusters."""
        shared = [key for key in first if key in second]
        a_up, a_down = self._resample({key: first[key] for key in shared})
        b_up, b_down = self._resample({key: second[key] for key in shared})
        result: dict[Key, Interval] = {}
        for column, key in enumerate(shared):
            with np.errstate(invalid="ignore", divide="ignore"):
                spread = a_up[:, column] / a_down[:, column] - b_up[:, column] / b_down[:, column]
            low, high = self._percentiles(spread)
            n = int(np.count_nonzero(first[key].denominator))
            value = first[key].value - second[key].value
            result[key] = Interval(value=value, low=low, high=high, n=n, clusters=self.count)
        return result

    def _resample(self, metrics: Mapping[Key, Terms]) -> tuple[Floats, Floats]:
        """[draws, metrics] numerators and denominators of every resample."""
        columns = [terms.numerator for terms in metrics.values()] + [terms.denominator for terms in metrics.values()]
        sums = np.stack([np.bincount(self.clusters, column, self.count) for column in columns], axis=1)
        rng = np.random.default_rng(self.seed)
        chunk = max(1, 4_000_000 // self.count)
        parts: list[Floats] = []
        for start in range(0, self.draws, chunk):
            rows = min(chunk, self.draws - start)
            drawn = rng.integers(0, self.count, (rows, self.count)) + self.count * np.arange(rows)[:, None]
            weights = np.bincount(drawn.ravel(), minlength=rows * self.count).reshape(rows, self.count)
            parts.append(weights.astype(np.float64) @ sums)
        totals = np.concatenate(parts)
        return totals[:, : len(metrics)], totals[:, len(metrics) :]

    def _range(self, numerators: Floats, denominators: Floats) -> tuple[float, float]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._percentiles(numerators / denominators)

    def _percentiles(self, values: Floats) -> tuple[float, float]:
        # A resample may hold no conversation that counts (no target in any list): it says nothing, and is left out.
        values = values[np.isfinite(values)]
        if not len(values):
            return float("nan"), float("nan")
        tail = (1 - self.level) / 2
        low, high = np.quantile(values, (tail, 1 - tail))
        return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Exact test of two arms on the same conversations."""

    first_only: int
    """Conversations that only the first arm got right."""
    second_only: int
    p: float
    """Two-sided. It takes conversations as independent; the clustered difference beside it does not."""


def mcnemar(first: Sequence[bool] | Floats, second: Sequence[bool] | Floats) -> McNemar:
    """The exact binomial McNemar test on paired hits.

    Args:
        first, second: [n] hit or miss of each arm, in the same order.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"the two arms have {a.size} and {b.size} conversations: a paired test needs the same ones")
    first_only, second_only = int((a & ~b).sum()), int((~a & b).sum())
    n, least = first_only + second_only, min(first_only, second_only)
    tail = sum(math.comb(n, wins) for wins in range(least + 1))
    return McNemar(first_only=first_only, second_only=second_only, p=min(1.0, 2 * tail / 2**n))


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's adjustment of several tests made at once; the keys keep their order."""
    adjusted: dict[Key, float] = {}
    running = 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        running = max(running, min(1.0, (len(p_values) - rank) * p))
        adjusted[key] = running
    return {key: adjusted[key] for key in p_values}
