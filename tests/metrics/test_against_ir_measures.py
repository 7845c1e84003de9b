"""The metrics against ir-measures (trec_eval), and ties against the mean over all orders of the tied items."""

from __future__ import annotations

import random
from itertools import permutations, product

import ir_measures
import pytest
from ir_measures import RR, P, R, nDCG

from lavic.metrics.ranking_metrics import NDCG_AT, RECALL_AT, compute_metrics
from lavic.metrics.relevance import Prediction, judge

MEASURES = {
    "hit_rate": P @ 1,
    "mrr": RR,
    **{f"recall_at_{k}": R @ k for k in RECALL_AT},
    **{f"ndcg_at_{k}": nDCG @ k for k in NDCG_AT},
}


def draw(rng: random.Random) -> Prediction:
    """A list of up to 30 candidates, of which some are targets; other targets are not in it."""
    candidates = [f"i{number:02}" for number in rng.sample(range(60), rng.randint(1, 30))]
    targets = {f"i{number:02}" for number in rng.sample(range(60), rng.randint(1, 12))}
    return Prediction(targets=tuple(sorted(targets)), candidates=tuple(candidates), ranking=tuple(candidates))


def test_a_thousand_rankings_without_ties():
    rng = random.Random(0)
    predictions = [draw(rng) for _ in range(1000)]
    computed = compute_metrics(judge(predictions))
    ours = {name: computed[name].numerator / computed[name].denominator for name in MEASURES}
    qrels = [
        ir_measures.Qrel(str(row), item, 1) for row, p in enumerate(predictions) for item in sorted(set(p.targets))
    ]
    run = [
        ir_measures.ScoredDoc(str(row), item, -float(rank))
        for row, p in enumerate(predictions)
        for rank, item in enumerate(p.ranking)
    ]
    theirs = {
        (value.measure, int(value.query_id)): value.value
        for value in ir_measures.iter_calc(MEASURES.values(), qrels, run)
    }
    assert len(theirs) == 1000 * len(MEASURES)
    for name, measure in MEASURES.items():
        expected = [theirs[measure, row] for row in range(1000)]
        assert ours[name].tolist() == pytest.approx(expected, abs=1e-12), name


def metrics(predictions: list[Prediction]) -> dict[str, float]:
    return {name: ratio.value for name, ratio in compute_metrics(judge(predictions)).items()}


@pytest.mark.parametrize("seed", range(60))
def test_ties_are_the_mean_over_all_orders(seed: int):
    rng = random.Random(seed)
    groups = [[f"{letter}{n}" for n in range(rng.randint(1, 4))] for letter in "abc"[: rng.randint(1, 3)]]
    items = [item for group in groups for item in group]
    targets = [*rng.sample(items, rng.randint(0, len(items))), *(["z0"] if rng.random() < 0.5 else [])] or ["a0"]
    targets += rng.choices(targets, k=rng.randint(0, 2))  # a file may repeat a target
    candidates = tuple(item for item in items if rng.random() < 0.8) or ("a0",)
    scores = tuple(float(-place) for place, group in enumerate(groups) for _ in group)
    tied = Prediction(targets=tuple(targets), candidates=candidates, ranking=tuple(items), scores=scores)
    orders = [
        Prediction(
            targets=tied.targets, candidates=candidates, ranking=tuple(item for group in order for item in group)
        )
        for order in product(*(permutations(group) for group in groups))
    ]
    assert metrics([tied]) == pytest.approx(metrics(orders), nan_ok=True)


def test_a_constant_score_gains_nothing_from_the_place_of_the_target():
    for place in range(5):
        items = tuple(("t" if n == place else f"i{n}") for n in range(5))
        got = metrics([Prediction(targets=("t",), candidates=items, ranking=items, scores=(0.5,) * 5)])
        assert got["hit_rate"] == pytest.approx(0.2)
        assert got["mrr"] == pytest.approx(sum(1 / rank for rank in range(1, 6)) / 5)


def test_scores_that_rise_or_are_no_numbers_are_refused():
    for scores in ((1.0, 2.0), (1.0, float("nan")), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="must be numbers that do not rise"):
            judge([Prediction(targets=("a",), candidates=("a", "b"), ranking=("a", "b"), scores=scores)])


def test_a_missing_ranking_keeps_its_place_in_the_denominator():
    right = Prediction(targets=("a",), candidates=("a", "b"), ranking=("a", "b"))
    missing = Prediction(targets=("a", "b", "b"), candidates=("a", "b"), ranking=())
    got = compute_metrics(judge([right, missing]))
    assert {got[name].value for name in ("hit_rate", "mrr", "recall_at_3", "ndcg_at_10", "valid_ratio")} == {0.5}
    assert got["recall_micro"].value == 0.25  # one of four pairs


def test_two_targets_of_which_the_list_has_one():
    got = metrics([Prediction(targets=("a", "b"), candidates=("a", "x"), ranking=("a", "x"))])
    assert got["ndcg_at_3"] == pytest.approx(0.613147, abs=1e-6)


def test_valid_ratio_as_scored_and_as_read_by_the_released_scripts():
    answers = [
        Prediction(targets=("a",), candidates=("a", "b"), ranking=("a",), answer=("a",)),
        Prediction(targets=("a",), candidates=("a", "b"), ranking=("a",), answer=("x",)),
        Prediction(targets=("a",), candidates=("a", "b"), ranking=("b",), answer=()),
        Prediction(targets=("a",), candidates=("a", "b"), ranking=()),
    ]
    got = metrics(answers)
    assert (got["valid_ratio"], got["valid_ratio_raw"]) == (0.75, 0.25)
    assert "valid_ratio_raw" not in metrics(answers[3:])


def test_calibration_error_by_hand():
    def rated(confidence: float, hit: bool) -> Prediction:
        return Prediction(
            targets=("a" if hit else "b",), candidates=("a", "b"), ranking=("a", "b"), confidence=confidence
        )

    # Bin .9-1: confidence .95 and hit rate .5 of 2 conversations; bin .3-.4: confidence .35 and hit rate 0 of 2.
    answers = [rated(0.9, True), rated(1.0, False), rated(0.3, False), rated(0.39999, False)]
    assert metrics(answers)["ece"] == pytest.approx((2 * 0.45 + 2 * 0.349995) / 4)
    assert metrics([rated(1.0, True)])["ece"] == 0.0
