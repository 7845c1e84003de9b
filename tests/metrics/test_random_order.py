"""Random orders: expectations and ranges against all orders of short lists, and what they cost."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from lavic.metrics import random_order
from lavic.metrics.random_order import RandomOrders
from lavic.metrics.ranking_metrics import compute_metrics
from lavic.metrics.relevance import Prediction, judge

pytestmark = pytest.mark.slow


def unranked(*rows: tuple[str, str]) -> list[Prediction]:
    """Predictions without a ranking, of (targets, candidates)."""
    return [Prediction(targets=tuple(t), candidates=tuple(c), ranking=()) for t, c in rows]


@pytest.mark.parametrize(
    ("targets", "candidates"),
    [("a", "abcd"), ("ab", "abcde"), ("az", "abc"), ("z", "abc"), ("abc", "abc"), ("aabz", "abcd"), ("a", "")],
)
def test_expectation_is_the_mean_over_all_orders(targets: str, candidates: str):
    orders = [
        Prediction(targets=tuple(targets), candidates=tuple(candidates), ranking=order)
        for order in permutations(candidates)
    ]
    means = {name: terms.value for name, terms in compute_metrics(judge(orders)).items()}
    expected = {name: terms.value for name, terms in RandomOrders(orders[:1]).expectation().items()}
    assert expected == pytest.approx(means, nan_ok=True)


def test_expectation_is_that_of_lists_whose_items_are_all_tied():
    """Conversation by conversation, with lists that are longer than the ranks that metrics look at."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = unranked(("a", letters), ("bbcz9", letters[:13]), ("9", "abc"), ("a", ""), ("ab", "baa"), (letters, letters))
    tied = []
    for row in rows:
        items = tuple(dict.fromkeys(row.candidates))
        tied.append(Prediction(targets=row.targets, candidates=items, ranking=items, scores=tuple(0.0 for _ in items)))
    expected = compute_metrics(judge(tied))
    for name, ratio in RandomOrders(rows).expectation().items():
        assert ratio.numerator == pytest.approx(expected[name].numerator), name
        assert ratio.denominator == pytest.approx(expected[name].denominator), name


@pytest.mark.parametrize(
    "rows",
    [
        [("ab", "abcde"), ("a", "abc")],
        [("aab", "abcd"), ("c", "abcde"), ("z", "ab")],
        [("abcz", "abcde"), ("", "")],
    ],
)
def test_range_is_that_of_the_scores_of_all_orders(rows: list[tuple[str, str]]):
    lists = [(targets or "z", candidates) for targets, candidates in rows]
    scores: dict[str, list[float]] = {}
    for orders in product(*(permutations(candidates) for _, candidates in lists)):
        ranked = [
            Prediction(targets=tuple(t), candidates=tuple(c), ranking=order)
            for (t, c), order in zip(lists, orders, strict=True)
        ]
        for name, ratio in compute_metrics(judge(ranked)).items():
            scores.setdefault(name, []).append(ratio.value)
    got = RandomOrders(unranked(*lists)).intervals(draws=20_000, level=0.8)
    assert set(got) == set(scores)
    for name, values in scores.items():
        # Scores are discrete: the bounds lie between those of slightly wider and slightly narrower tails.
        for bound, tail in ((got[name].low, 0.1), (got[name].high, 0.9)):
            low, high = np.quantile(values, (tail - 0.02, tail + 0.02))
            assert low - 1e-9 <= bound <= high + 1e-9, name


def test_range_is_where_random_pickers_fall():
    answers = unranked(("a", "abcdefghij")) * 400
    got = RandomOrders(answers).intervals()
    assert got["hit_rate"].value == pytest.approx(0.1)
    # Binomial(400, .1): 95 % of the mass lies in [28.5, 52] hits, give or take the step of one hit and the draws.
    assert got["hit_rate"].low == pytest.approx(0.0725, abs=0.006)
    assert got["hit_rate"].high == pytest.approx(0.13, abs=0.006)
    assert got["valid_ratio"].low == 1.0
    assert RandomOrders(answers).intervals() == got
    assert RandomOrders(answers).intervals(seed=1) != got


def test_lists_of_unequal_length():
    got = RandomOrders(unranked(("a", "a"), ("a", "abcdefghij"))).intervals(draws=4000)
    assert got["hit_rate"].value == pytest.approx(0.55)
    assert (got["hit_rate"].low, got["hit_rate"].high) == (0.5, 1.0)


def test_lists_without_a_target():
    got = RandomOrders(unranked(("z", "abc"), ("z", ""))).intervals()
    assert (got["hit_rate"].value, got["hit_rate"].low, got["hit_rate"].high) == (0.0, 0.0, 0.0)
    assert got["valid_ratio"].value == got["valid_ratio"].low == got["valid_ratio"].high == 0.5
    assert got["hit_rate_in_list"].as_dict() == {"value": None, "low": None, "high": None, "n": 0}


def test_a_draw_costs_a_number_for_each_listed_target_and_not_for_each_candidate(monkeypatch: pytest.MonkeyPatch):
    drawn = 0

    class Counted:
        def __init__(self, seed: int) -> None:
            self.rng = np.random.Generator(np.random.PCG64(seed))

        def random(self, shape: tuple[int, ...]) -> np.ndarray:
            nonlocal drawn
            drawn += int(np.prod(shape))
            return self.rng.random(shape)

    monkeypatch.setattr(random_order.np.random, "default_rng", Counted)
    items = tuple(f"{number}" for number in range(100))
    rows = [Prediction(targets=items[:1], candidates=items, ranking=())] * 300
    rows += [Prediction(targets=items[:2], candidates=items, ranking=())] * 100
    rows += [Prediction(targets=("x",), candidates=items, ranking=())] * 600
    RandomOrders(rows).intervals(draws=50)
    assert drawn == 50 * (300 + 2 * 100)
