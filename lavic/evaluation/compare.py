"""Finished evaluations compared, from their files alone: the same conversations, paired; seeds pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lavic.errors import DataError, first_names
from lavic.evaluation.assessment import RANDOM, as_dicts, compare_arms
from lavic.evaluation.predictions import PredictionSet
from lavic.metrics.bootstrap import Bootstrap
from lavic.metrics.ranking_metrics import ceilings, compute_metrics
from lavic.metrics.relevance import judge

SHOWN = 3
"""Conversations named of those that only one evaluation has."""


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One evaluation of a system."""

    source: str
    """Its folder, for messages."""
    rows: PredictionSet
    arm: str


def compare_systems(
    systems: Mapping[str, Sequence[Seed]], *, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Metrics of each system, and the first one compared with each other one.

    Several seeds of a system are pooled: its value is their mean, and its interval resamples clusters of conversations
    and seeds, so that more seeds never count as more conversations.

    Args:
        systems: Name -> its evaluations, one per seed, all of the same conversations.
        draws, level, seed: Of the bootstrap.

    Returns:
        `systems`: name -> `seeds`, `metrics` with intervals, the standard deviation between seeds of each (`spread`,
        from two seeds on) and the `ceiling` of its lists; `against`: as `compare_arms`; `conversations`, `clusters`.

    Raises:
        DataError: Evaluations are of other conversations.
    """
    first = next(iter(systems.values()))[0]
    bootstrap = Bootstrap(first.rows.cluster_numbers(), draws=draws, level=level, seed=seed)
    metrics = {}
    results: dict[str, Any] = {}
    for name, seeds in systems.items():
        judged = []
        for one_seed in seeds:
            rows = same_order(one_seed, first)
            judged.append(judge(rows.predictions(one_seed.arm)))
        metrics[name] = [compute_metrics(relevance) for relevance in judged]
        spread = {
            key: float(np.std([ratios[key].value for ratios in metrics[name]], ddof=1))
            for key, ratio in metrics[name][0].items()
            if len(seeds) > 1 and ratio.denominator.any() and all(key in ratios for ratios in metrics[name])
        }
        results[name] = {
            "seeds": len(seeds),
            "sources": [one_seed.source for one_seed in seeds],
            "arms": sorted({one_seed.arm for one_seed in seeds}),
            "metrics": as_dicts(bootstrap.pooled(metrics[name])),
            **({"spread": spread} if spread else {}),
            "ceiling": as_dicts(bootstrap.intervals(ceilings(judged[0]))),
        }
    expected = {name for name, seeds in systems.items() if any(one_seed.arm == RANDOM for one_seed in seeds)}
    return {
        "conversations": len(first.rows.ids),
        "clusters": bootstrap.count,
        "main": next(iter(systems)),
        "systems": results,
        "against": compare_arms(metrics, next(iter(systems)), bootstrap, untested=expected),
    }


def same_order(seed: Seed, first: Seed) -> PredictionSet:
    """An evaluation's rows in the order of another's.

    Raises:
        DataError: The two are of other conversations.
    """
    rows, target = seed.rows, first.rows
    row_of_id = {id: number for number, id in enumerate(rows.ids)}
    first_ids = set(target.ids)
    for side, other, ids in (
        (first, seed, [id for id in target.ids if id not in row_of_id]),
        (seed, first, [id for id in rows.ids if id not in first_ids]),
    ):
        if ids:
            raise DataError(f"{side.source}: has conversations that {other.source} has not: {first_names(ids, SHOWN)}")
    order = [row_of_id[id] for id in target.ids]
    for number, row in enumerate(order):
        if set(rows.targets[row]) != set(target.targets[number]):
            raise DataError(
                f"{seed.source} and {first.source} have other targets of the conversation {target.ids[number]}: they "
                "are of other test files"
            )
    return PredictionSet(
        name=rows.name,
        ids=target.ids,
        targets=[rows.targets[row] for row in order],
        lists=[rows.lists[row] for row in order],
        clusters=target.clusters,
        rankings={arm: [ranked[row] for row in order] for arm, ranked in rows.rankings.items()},
    )
