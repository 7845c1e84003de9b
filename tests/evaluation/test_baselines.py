"""The free baselines: exact expectations against brute force, and no help from the order of the list."""

from __future__ import annotations

from itertools import permutations

import pytest

from lavic.evaluation.baselines import count_targets, list_order, popularity, random_intervals, repeat_last
from lavic.metrics.ranking_metrics import Prediction, compute_metrics, expected_random, judge


@pytest.mark.parametrize(
    ("targets", "candidates"), [("a", "abcd"), ("ab", "abcde"), ("az", "abc"), ("z", "abc"), ("abc", "abc")]
)
def test_expectation_is_the_mean_over_all_orders(targets: str, candidates: str):
    orders = [
        Prediction(targets=tuple(targets), candidates=tuple(candidates), ranking=order)
        for order in permutations(candidates)
    ]
    means = {name: terms.value for name, terms in compute_metrics(judge(orders)).items()}
    expected = {name: terms.value for name, terms in expected_random(orders[:1]).items()}
    assert expected == pytest.approx(means, nan_ok=True)


def test_range_is_where_random_pickers_fall():
    answers = [Prediction(targets=("a",), candidates=tuple("abcdefghij"), ranking=())] * 400
    got = random_intervals(answers)
    assert got["hit_rate"].value == pytest.approx(0.1)
    # Binomial(400, .1): 95 % of the mass lies in [28.5, 52] hits, give or take the step of one hit and the draws.
    assert got["hit_rate"].low == pytest.approx(0.0725, abs=0.006)
    assert got["hit_rate"].high == pytest.approx(0.13, abs=0.006)
    assert got["valid_ratio"].low == 1.0
    assert random_intervals(answers) == got


def test_lists_of_unequal_length():
    answers = [
        Prediction(targets=("a",), candidates=("a",), ranking=()),
        Prediction(targets=("a",), candidates=tuple("abcdefghij"), ranking=()),
    ]
    got = random_intervals(answers, draws=4000)
    assert got["hit_rate"].value == pytest.approx(0.55)
    assert (got["hit_rate"].low, got["hit_rate"].high) == (0.5, 1.0)


def test_popularity_counts_and_leaves_equals_tied():
    counts = count_targets([["c"], ["c", "b"], ["z"]])
    ranked = popularity(["a", "b", "c", "d"], counts)
    assert (ranked.ids, ranked.scores) == (("c", "b", "a", "d"), (2.0, 1.0, 0.0, 0.0))
    assert list_order(["b", "a", "b"]).ids == ("b", "a")


def test_the_last_named_item_comes_first_and_the_rest_is_tied():
    ranked = repeat_last(["a", "b", "c", "d"], ["b", "c", "b", "z"])
    assert (ranked.ids, ranked.scores) == (("b", "c", "a", "d"), (3.0, 2.0, 0.0, 0.0))
    assert set(repeat_last(["a", "b"], []).scores) == {0.0}
