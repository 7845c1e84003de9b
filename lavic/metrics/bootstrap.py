"""Confidence intervals and paired differences for conversations that are not independent.

In the released data a quarter of the test rows share their submission with another row, and popular items are targets
many times. Rows that share either are resampled together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lavic.metrics.ranking_metrics import Ratio
from lavic.metrics.relevance import Floats

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float
    n: int
    """Number of conversations."""
    clusters: int | None = None
    """Number of independent clusters of these conversations; None where it does not apply."""

    def as_dict(self) -> dict[str, float | int | None]:
        """The form of `results.json`: value, low, high, n, and clusters where known.

        None for what has no value: a metric of which no conversation is part.
        """
        known = {key: value for key, value in asdict(self).items() if value is not None}
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in known.items()}


def connected_clusters(keys: Sequence[Iterable[Hashable]]) -> NDArray[np.int64]:
    """Numbers the clusters of rows that share a key, directly or through other rows.

    Args:
        keys: The keys of each row, such as its submission and its targets.

    Returns:
        [n] cluster numbers from 0, in order of first appearance.
    """
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    first_row: dict[Hashable, int] = {}
    for row, row_keys in enumerate(keys):
        for key in row_keys:
            a, b = root(row), root(first_row.setdefault(key, row))
            parent[max(a, b)] = min(a, b)
    return cluster_numbers(root(row) for row in range(len(keys)))


def cluster_numbers(labels: Iterable[Hashable]) -> NDArray[np.int64]:
    """Labels as integers from 0, in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


class Bootstrap:
    """Percentile cluster bootstrap of ratios of sums.

    Clusters are drawn with replacement. The same seed draws the same clusters, so intervals of several metrics, and
    differences of several models on the same conversations, use the same draws (paired).

    Args:
        clusters: [n] cluster number of each conversation (see `connected_clusters`).
        draws: Number of resamples.
        level: Confidence level.
        seed: Seed of the draws.
    """

    def __init__(self, clusters: NDArray[np.int64], *, draws: int = 10_000, level: float = 0.95, seed: int = 0):
        if len(clusters) == 0:
            raise ValueError("a bootstrap needs at least one conversation")
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, not {level}")
        self.clusters = cluster_numbers(clusters.tolist())
        self.count = int(self.clusters.max()) + 1
        self.draws, self.level, self.seed = draws, level, seed

    def intervals(self, metrics: Mapping[Key, Ratio]) -> dict[Key, Interval]:
        """The value and interval of each metric.

        Where resamples do not vary, since all clusters have the same outcome or there is one alone, the bootstrap says
        nothing: the interval is then what the population may have if the share of other clusters in it is as large as
        the exact binomial bound for a kind that was not seen. Of hits this is the exact binomial interval, so that 1.0
        has one too.
        """
        return self.pooled([metrics])

    def pooled(self, seeds: Sequence[Mapping[Key, Ratio]]) -> dict[Key, Interval]:
        """As `intervals`, of several seeds of one model on the same conversations.

        The value is the mean of the seeds' values. Each resample draws clusters and, of these, seeds.

        Args:
            seeds: The metrics of each seed; those that all have are given.
        """
        keys = _shared(seeds)
        tables = self._resample_seeds(seeds, keys)
        values = self._draw_seeds(tables, stream=0)
        intervals: dict[Key, Interval] = {}
        for column, key in enumerate(keys):
            ratios = [metrics[key] for metrics in seeds]
            low, high = self._percentiles(values[:, column], _mean(ratios))
            if all(_is_constant(table[:, column]) for table in tables):
                binned = any(ratio.bins is not None for ratio in ratios)
                low, high = self._widened(low, high, ratios[0], lowest=-1.0 if binned else 0.0)
                low = max(low, 0.0)
            intervals[key] = self._interval(_mean(ratios), low, high, ratios[0])
        return intervals

    def pooled_differences(
        self, first: Sequence[Mapping[Key, Ratio]], second: Sequence[Mapping[Key, Ratio]]
    ) -> dict[Key, Interval]:
        """`first - second`, of the means of two models' seeds, for each metric that all seeds have.

        Both models are resampled with the same clusters, and each with seeds of its own.
        """
        keys = _shared([*first, *second])
        first_tables, second_tables = self._resample_seeds(first, keys), self._resample_seeds(second, keys)
        values = self._draw_seeds(first_tables, stream=1) - self._draw_seeds(second_tables, stream=2)
        pairs = [
            *((table, second_tables[0]) for table in first_tables),
            *((first_tables[0], other) for other in second_tables),
        ]
        intervals: dict[Key, Interval] = {}
        for column, key in enumerate(keys):
            ratio = first[0][key]
            value = _mean([metrics[key] for metrics in first]) - _mean([metrics[key] for metrics in second])
            low, high = self._percentiles(values[:, column], value)
            if all(_is_constant(table[:, column] - other[:, column]) for table, other in pairs):
                low, high = self._widened(low, high, ratio, lowest=-1.0)
            intervals[key] = self._interval(value, low, high, ratio)
        return intervals

    def _resample_seeds(self, seeds: Sequence[Mapping[Key, Ratio]], keys: Sequence[Key]) -> list[Floats]:
        """Of each seed: [draws, metrics] the value of each metric in each resample of the clusters."""
        return [self._resample({key: metrics[key] for key in keys}) for metrics in seeds]

    def _draw_seeds(self, tables: Sequence[Floats], *, stream: int) -> Floats:
        """[draws, metrics] the mean over drawn seeds of each metric in each resample."""
        if len(tables) == 1:
            return tables[0]
        drawn = np.random.default_rng((self.seed, stream)).integers(0, len(tables), (self.draws, len(tables)))
        return sum(
            ((drawn == number).mean(axis=1)[:, None] * table for number, table in enumerate(tables)),
            start=np.zeros_like(tables[0]),
        )

    def _widened(self, low: float, high: float, ratio: Ratio, *, lowest: float) -> tuple[float, float]:
        """Bounds of values between `lowest` and 1 if as many clusters as may have gone unseen have the extreme ones.

        Clusters without a conversation that counts, such as lists without a target, tell nothing.
        """
        unseen = 1 - ((1 - self.level) / 2) ** (1 / max(1, self._clusters(ratio)))
        return low - unseen * (low - lowest), high + unseen * (1 - high)

    def _interval(self, value: float, low: float, high: float, ratio: Ratio) -> Interval:
        n = int(np.count_nonzero(ratio.denominator))
        return Interval(value=value, low=low, high=high, n=n, clusters=self._clusters(ratio))

    def _clusters(self, ratio: Ratio) -> int:
        """Number of clusters with a conversation in the denominator."""
        return len(np.unique(self.clusters[ratio.denominator > 0]))

    def _resample(self, metrics: Mapping[Key, Ratio]) -> Floats:
        """[draws, metrics] the value of each metric in each resample."""
        columns: list[Floats] = []
        owner: list[int] = []
        for number, ratio in enumerate(metrics.values()):
            columns += ratio.parts
            owner += [number] * len(ratio.parts)
        width = len(columns)
        columns += [ratio.denominator for ratio in metrics.values()]
        binned = np.array([ratio.bins is not None for ratio in metrics.values()])[owner]
        starts = np.searchsorted(owner, np.arange(len(metrics)))
        cluster_sums = np.stack([np.bincount(self.clusters, column, self.count) for column in columns], axis=1)
        values: list[Floats] = []
        for weights in self._weights():
            drawn = weights @ cluster_sums
            numerators = np.add.reduceat(np.where(binned, np.abs(drawn[:, :width]), drawn[:, :width]), starts, axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                values.append(numerators / drawn[:, width:])
        return np.concatenate(values)

    def _weights(self) -> Iterator[Floats]:
        """[draws, clusters] how often each resample has each cluster, in chunks of bounded memory."""
        rng = np.random.default_rng(self.seed)
        chunk = max(1, 4_000_000 // self.count)
        for start in range(0, self.draws, chunk):
            rows = min(chunk, self.draws - start)
            drawn = rng.integers(0, self.count, (rows, self.count)) + self.count * np.arange(rows)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=rows * self.count)
            yield counts.reshape(rows, self.count).astype(np.float64)

    def _percentiles(self, values: Floats, value: float) -> tuple[float, float]:
        """The interval of resampled values; where none of them exists, the value itself."""
        # A resample without a conversation that counts (no target in any list) has no value.
        values = values[np.isfinite(values)]
        if not len(values):
            return value, value
        tail = (1 - self.level) / 2
        low, high = np.quantile(values, (tail, 1 - tail))
        return float(low), float(high)


def _is_constant(values: Floats) -> bool:
    values = values[np.isfinite(values)]
    return not len(values) or float(np.ptp(values)) < 1e-9


def _shared(seeds: Sequence[Mapping[Key, Ratio]]) -> list[Key]:
    return [key for key in seeds[0] if all(key in metrics for metrics in seeds)]


def _mean(ratios: Sequence[Ratio]) -> float:
    return sum(ratio.value for ratio in ratios) / len(ratios)


def mean_ratio(ratios: Sequence[Ratio]) -> Ratio:
    """The mean over seeds of a metric without bins, conversation by conversation."""
    return Ratio(np.mean([ratio.numerator for ratio in ratios], axis=0), ratios[0].denominator)
