"""From rankings to the numbers of `results.json`: metrics with intervals, and paired comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lavic.evaluation.baselines import random_intervals
from lavic.evaluation.test_set import ClusterBy, TestSet
from lavic.metrics.ranking_metrics import Ratio, compute_metrics, expected_random, judge, oracle_hit_rate
from lavic.metrics.statistics import Bootstrap, Interval, holm, mcnemar

RANDOM = "random"
"""The baseline that is computed, not run."""


def assess(
    test_set: TestSet,
    rankings: Mapping[str, Sequence[Sequence[str]]],
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
        rankings: Arm -> ranked ids of each conversation. An arm is the main model, a control or a baseline.
        main: The arm that the others are compared with.
        random: Whether to add the random baseline.
        cluster: Which conversations are resampled together.
        draws, level, seed: Of the bootstrap.

    Returns:
        `arms`: arm -> metric -> value, low, high, n; `against`: arm -> the paired difference in hit rate (main minus
        arm), the numbers of conversations that only one of the two got right, McNemar's exact p and its adjustment by
        Holm; `ceiling`: the upper bound of the hit rate on these lists; and what the test set holds.
    """
    bootstrap = Bootstrap(test_set.clusters(cluster), draws=draws, level=level, seed=seed)
    metrics: dict[str, dict[str, Ratio]] = {
        arm: compute_metrics(judge(test_set.predictions(ids))) for arm, ids in rankings.items()
    }
    intervals: dict[str, dict[str, Interval]] = {arm: bootstrap.intervals(ratios) for arm, ratios in metrics.items()}
    unranked = test_set.predictions([()] * len(test_set))
    if random:
        metrics[RANDOM] = expected_random(judge(unranked))
        intervals[RANDOM] = random_intervals(unranked, level=level, seed=seed)
    ceiling = bootstrap.intervals({"ceiling": oracle_hit_rate(judge(unranked))})["ceiling"]
    return {
        "file": str(test_set.file),
        "sha256": test_set.sha256,
        "conversations": len(test_set),
        "left_out": test_set.left_out,
        "list_length": float(np.mean([len(candidates) for candidates in test_set.lists])),
        "clusters": bootstrap.count,
        "clustered_by": cluster,
        "ceiling": ceiling.as_dict(),
        "arms": {
            arm: {name: interval.as_dict() for name, interval in arm_intervals.items()}
            for arm, arm_intervals in intervals.items()
        },
        "against": _comparisons(metrics, main, bootstrap) if main in metrics else {},
    }


def _comparisons(metrics: Mapping[str, Mapping[str, Ratio]], main: str, bootstrap: Bootstrap) -> dict[str, Any]:
    """The main arm compared with each other one, on the same conversations."""
    hits = metrics[main]["hit_rate"]
    rows: dict[str, dict[str, Any]] = {}
    for arm in (arm for arm in metrics if arm != main):
        other = metrics[arm]["hit_rate"]
        rows[arm] = {"difference": bootstrap.differences({"hit_rate": hits}, {"hit_rate": other})["hit_rate"].as_dict()}
        if arm != RANDOM:  # an expectation has no hits to pair
            rows[arm] |= asdict(mcnemar(hits.numerator, other.numerator))
    for arm, p in holm({arm: row["p"] for arm, row in rows.items() if "p" in row}).items():
        rows[arm]["p_holm"] = p
    return rows
