"""From rankings to the numbers of `results.json`: metrics with intervals, and paired comparisons."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lavic.errors import DataError
from lavic.evaluation.test_set import ClusterBy, TestSet
from lavic.metrics.bootstrap import Bootstrap, Interval, mean_ratio
from lavic.metrics.random_order import RandomOrders
from lavic.metrics.ranking_metrics import BINS, Ratio, ceilings, compute_metrics, confidence_bins
from lavic.metrics.relevance import Relevance, judge
from lavic.metrics.significance import holm, mcnemar, permutation_test
from lavic.recommend.ranking.ranked_list import RankedList

RANDOM = "random"
"""The baseline that is computed, not run."""

COMPARED_METRICS = ("hit_rate", "mrr", "ndcg_at_10")
"""Metrics of which the main arm's differences are tested."""


def assess(
    test_set: TestSet,
    rankings: Mapping[str, Sequence[RankedList | None]],
    *,
    main: str,
    random: bool = True,
    cluster: ClusterBy = "both",
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """All numbers of one test set.

    Args:
        test_set: The conversations.
        rankings: Arm -> a ranking of each conversation, None where the arm has none: a miss. An arm is a model, a
            control, a baseline or another system.
        main: The arm that the others are compared with.
        random: Whether to add the random baseline.
        cluster: Which conversations are resampled together.
        draws, level, seed: Of the bootstrap.

    Returns:
        `arms`: arm -> metric -> value, low, high, n; `ceiling`: the best `row` and `micro` scores on these lists;
        `against`: arm -> the main arm compared with it (see `compare_arms`); `calibration`: arm -> its reliability by
        bin; `missing`: arm -> conversations without a ranking, where there are any; and what the test set holds.

    Raises:
        DataError: An arm has no ranking at all: it did not run.
    """
    clusters = test_set.clusters(cluster)
    bootstrap = Bootstrap(clusters, draws=draws, level=level, seed=seed)
    judged = {arm: judge(test_set.predictions(rows)) for arm, rows in check_arms(rankings).items()}
    metrics: dict[str, dict[str, Ratio]] = {arm: compute_metrics(relevance) for arm, relevance in judged.items()}
    intervals: dict[str, dict[str, Interval]] = {arm: bootstrap.intervals(ratios) for arm, ratios in metrics.items()}
    unranked = test_set.predictions([None] * len(test_set))
    if random:
        orders = RandomOrders(unranked)
        metrics[RANDOM] = orders.expectation()
        intervals[RANDOM] = orders.intervals(level=level, seed=seed)
    missing = {arm: count for arm, rows in rankings.items() if (count := sum(row is None for row in rows))}
    calibration = {arm: bins for arm, relevance in judged.items() if (bins := reliability(relevance))}
    return {
        "file": str(test_set.file),
        "sha256": test_set.sha256,
        "conversations": len(test_set),
        "targets": sum(len(conversation.targets) for conversation in test_set.conversations),
        "left_out": test_set.left_out,
        "list_length": float(np.mean([len(candidates) for candidates in test_set.lists])),
        "clusters": bootstrap.count,
        "clustered_by": cluster,
        "ceiling": as_dicts(bootstrap.intervals(ceilings(judge(unranked)))),
        "arms": {arm: as_dicts(arm_intervals) for arm, arm_intervals in intervals.items()},
        **({"missing": missing} if missing else {}),
        **({"calibration": calibration} if calibration else {}),
        "against": compare_arms({arm: [ratios] for arm, ratios in metrics.items()}, main, bootstrap, untested={RANDOM})
        if main in metrics
        else {},
    }


def check_arms(rankings: Mapping[str, Sequence[RankedList | None]]) -> Mapping[str, Sequence[RankedList | None]]:
    """Refuses an arm without a single ranking: it did not run, and a score of 0 would say that it is bad.

    Raises:
        DataError: There is such an arm.
    """
    for arm, rows in rankings.items():
        if all(row is None for row in rows):
            raise DataError(f"the arm {arm} has no ranking for any of the {len(rows):,} conversations: it did not run")
    return rankings


def reliability(judged: Relevance) -> list[dict[str, float | int]]:
    """Confidence and hit rate by bin of confidence; empty bins are left out.

    Returns:
        For each bin `low` and `high` (of the confidence), `n` (conversations), their mean `confidence` and `hit_rate`.
    """
    rated = np.flatnonzero(~np.isnan(judged.confidence))
    confidence, hits = judged.confidence[rated], judged.relevance[rated, 0]
    bins = confidence_bins(confidence)
    return [
        {
            "low": number / BINS,
            "high": (number + 1) / BINS,
            "n": int((bins == number).sum()),
            "confidence": float(confidence[bins == number].mean()),
            "hit_rate": float(hits[bins == number].mean()),
        }
        for number in np.unique(bins).tolist()
    ]


def compare_arms(
    metrics: Mapping[str, Sequence[Mapping[str, Ratio]]], main: str, bootstrap: Bootstrap, *, untested: Collection[str]
) -> dict[str, Any]:
    """The main arm compared with each other one, on the same conversations.

    Args:
        metrics: Arm -> its metrics, of each of its seeds.
        main: The arm that the others are compared with.
        bootstrap: Of the conversations.
        untested: Arms that are expectations: they have a difference and no test.

    Returns:
        Arm -> `difference` of the hit rate (main minus arm) with its interval; `first_only` and `second_only`, the
        conversations that only one of the two certainly got right; `test`, `p` and `p_holm`, adjusted for the number of
        arms; `metrics`: the same for the other metrics of `COMPARED_METRICS`. The test of the hit rate is McNemar's
        exact one, or the paired permutation test over clusters where ties or several seeds make hits uncertain; ranked
        metrics have the permutation test.
    """
    rows: dict[str, dict[str, Any]] = {}
    tests: dict[str, dict[str, float]] = {name: {} for name in COMPARED_METRICS}
    for arm in (arm for arm in metrics if arm != main):
        sides = [[{name: seed[name] for name in COMPARED_METRICS} for seed in metrics[side]] for side in (main, arm)]
        differences = as_dicts(bootstrap.pooled_differences(*sides))
        row: dict[str, Any] = {name: {"difference": differences[name]} for name in COMPARED_METRICS}
        if not {arm, main} & set(untested):
            for name in COMPARED_METRICS:
                first, second = (mean_ratio([seed[name] for seed in side]) for side in sides)
                row[name] |= _test(first, second, bootstrap, exact=name == "hit_rate")
                tests[name][arm] = row[name]["p"]
        rows[arm] = row
    for name, p_values in tests.items():
        for arm, p in holm(p_values).items():
            rows[arm][name]["p_holm"] = p
    return {
        arm: {**row["hit_rate"], "metrics": {name: row[name] for name in COMPARED_METRICS[1:]}}
        for arm, row in rows.items()
    }


def _test(first: Ratio, second: Ratio, bootstrap: Bootstrap, *, exact: bool) -> dict[str, Any]:
    counts: dict[str, int] = {}
    if exact:
        paired = mcnemar(first.numerator, second.numerator)
        counts = {"first_only": paired.first_only, "second_only": paired.second_only}
        if all(np.isin(ratio.numerator, (0.0, 1.0)).all() for ratio in (first, second)):
            return {**counts, "test": "mcnemar", "p": paired.p}
    p = permutation_test(first, second, bootstrap.clusters, draws=bootstrap.draws, seed=bootstrap.seed)
    return {**counts, "test": "permutation", "p": p}


def as_dicts(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float | int | None]]:
    """Intervals in the form of `results.json`."""
    return {name: interval.as_dict() for name, interval in intervals.items()}
