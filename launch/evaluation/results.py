"""The content of `results.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavic.config import flatten
from lavic.errors import LavicError
from lavic.evaluation.assessment import RANDOM, assess
from lavic.evaluation.model_arms.list_orders import order_bias
from lavic.evaluation.model_arms.model_rankings import ModelRankings
from lavic.evaluation.none_of_these import none_of_these_metrics
from lavic.tracking.run_metadata import versions

if TYPE_CHECKING:
    from lavic.launch.evaluation.arm_rankings import Rankings
    from lavic.launch.evaluation.settings import EvaluateSettings
    from lavic.launch.evaluation.setup.evaluation_setup import EvaluationSetup

RESULTS = "results.json"
"""The file in OUT that is written last."""
PARTIAL = "results.partial.json"
"""The same of an evaluation of which some arms have not run."""


class PartialResults(LavicError):
    """Some arms have not run; the others have results."""

    def __init__(self, failed: Mapping[str, LavicError], file: Path) -> None:
        reasons = "; ".join(f"--arms {arm} has not run: {error}" for arm, error in failed.items())
        super().__init__(f"{reasons}; {file} has the other arms: run the same command again, which keeps them")
        self.exit_code = next(iter(failed.values())).exit_code


def add_model_arms(
    results: dict[str, Any], chosen: EvaluateSettings, setup: EvaluationSetup, ranked: ModelRankings
) -> None:
    """Adds what the order of the lists does, by test set and arm, and how lists were ranked in groups."""
    for test_set in setup.test_sets:
        if by_arm := ranked.orders[test_set.name]:
            results["sets"][test_set.name]["order"] = {
                arm: order_bias(test_set, lists, chosen.seed) for arm, lists in by_arm.items()
            }
    if ranked.groups:
        results["groups"] = ranked.groups


def compute_results(chosen: EvaluateSettings, setup: EvaluationSetup, rankings: Rankings) -> dict[str, Any]:
    """The content of `results.json`; its `ceiling`, `arms` and `hit_rate` are those of the main test set."""
    sets: dict[str, Any] = {}
    main = setup.main
    for test_set in setup.test_sets:
        by_arm = rankings[test_set.name]
        sets[test_set.name] = assess(
            test_set,
            {arm: by_arm[arm] for arm in setup.names if arm in by_arm},
            main=main,
            random=RANDOM in setup.names,
            cluster=chosen.cluster,
            draws=chosen.draws,
            level=chosen.level,
            seed=chosen.seed,
        )
        none = {arm: none_of_these_metrics(test_set, ranked) for arm, ranked in by_arm.items()}
        if known := {arm: metrics for arm, metrics in none.items() if metrics is not None}:
            sets[test_set.name]["none"] = known
    first = setup.test_sets[0].name
    arms = {
        arm: {
            metric: {key: interval[key] for key in ("value", "low", "high", "n")}
            for metric, interval in metrics.items()
        }
        for arm, metrics in sets[first]["arms"].items()
    }
    return {
        "ceiling": {kind: interval["value"] for kind, interval in sets[first]["ceiling"].items()},
        "arms": arms,
        "hit_rate": {arm: metrics["hit_rate"] for arm, metrics in arms.items()},
        "main": main,
        "main_set": first,
        "labels": setup.labels,
        "sets": sets,
        "base": setup.info.base if setup.info else None,
        "settings": flatten(chosen),
        "versions": versions("lavic", "torch", "transformers"),
    }
