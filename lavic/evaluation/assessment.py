"""From rankings to the numbers of `results.json`: every arm's metrics with intervals, and the arms side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lavic.evaluation.baselines import expected_random, random_intervals
from lavic.evaluation.test_set import Clusters, Trial
from lavic.metrics.ranking_metrics import Terms, ceiling, judge, measure
from lavic.metrics.statistics import Bootstrap, Interval, holm, mcnemar

RANDOM = "random"
"""The arm that is computed, not run."""


def assess(
    trial: Trial,
    rankings: Mapping[str, Sequence[Sequence[str]]],
    *,
    main: str,
    random: bool = True,
    cluster: Clusters = "both",
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """All numbers of one trial.

    Args:
        trial: The conversations.
        rankings: Arm -> ranked ids of each conversation.
        main: The arm that the others are set against.
        random: Whether to add the random arm.
        cluster: What is resampled together.
        draws, level, seed: Of the bootstrap.

    Returns:
        `arms`: arm -> metric -> value, low, high, n; `against`: arm -> the paired difference in hit rate (main minus
        arm), the counts of conversations that only one of the two got right, McNemar's exact p and Holm's adjustment of
        it; `ceiling`: the best hit rate these lists allow; and what the trial was.
    """
    clusters = trial.clusters(cluster)
    bootstrap = Bootstrap(clusters, draws=draws, level=level, seed=seed)
    answers = {arm: trial.answers(ids) for arm, ids in rankings.items()}
    terms: dict[str, dict[str, Terms]] = {arm: measure(judge(given)) for arm, given in answers.items()}
    intervals: dict[str, dict[str, Interval]] = {arm: bootstrap.intervals(of) for arm, of in terms.items()}
    unranked = trial.answers([()] * len(trial))
    if random:
        terms[RANDOM] = expected_random(unranked)
        intervals[RANDOM] = random_intervals(unranked, level=level, seed=seed)
    best = bootstrap.intervals({"ceiling": ceiling(judge(unranked))})["ceiling"]
    return {
        "file": str(trial.file),
        "sha256": trial.sha256,
        "conversations": len(trial),
        "left_out": trial.left_out,
        "list_length": float(np.mean([len(listed) for listed in trial.lists])),
        "clusters": bootstrap.count,
        "clustered_by": cluster,
        "ceiling": best.as_dict(),
        "arms": {arm: {name: one.as_dict() for name, one in of.items()} for arm, of in intervals.items()},
        "against": _against(terms, main, bootstrap) if main in terms else {},
    }


def _against(terms: Mapping[str, Mapping[str, Terms]], main: str, bootstrap: Bootstrap) -> dict[str, Any]:
    """The main arm against each other one, on the same conversations."""
    first = {"hit_rate": terms[main]["hit_rate"]}
    result: dict[str, dict[str, Any]] = {}
    for arm, of in terms.items():
        if arm == main:
            continue
        difference = bootstrap.differences(first, {"hit_rate": of["hit_rate"]})["hit_rate"]
        result[arm] = {"difference": difference.as_dict()}
        if arm != RANDOM:  # an expectation has no hits to pair
            result[arm] |= asdict(mcnemar(first["hit_rate"].numerator, of["hit_rate"].numerator))
    adjusted = holm({arm: row["p"] for arm, row in result.items() if "p" in row})
    for arm, p in adjusted.items():
        result[arm]["p_holm"] = p
    return result
