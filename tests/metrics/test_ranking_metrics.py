"""The metrics against hand-worked values and against a slow, independent reading of their definitions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavic.metrics.ranking_metrics import HELP, LABELS, ceilings, compute_metrics
from lavic.metrics.relevance import Prediction, judge


def answer(targets: str, candidates: str, ranking: str) -> Prediction:
    return Prediction(targets=tuple(targets), candidates=tuple(candidates), ranking=tuple(ranking))


def values(*answers: Prediction) -> dict[str, float]:
    return {name: terms.value for name, terms in compute_metrics(judge(answers)).items()}


def test_labels_and_help_name_every_metric():
    rated = Prediction(targets=("a",), candidates=("a",), ranking=("a",), confidence=0.5, answer=("a",))
    assert list(values(rated)) == list(LABELS) == list(HELP)


def test_one_right_one_wrong():
    got = values(answer("a", "abc", "abc"), answer("a", "abc", "bac"))
    assert got["hit_rate"] == 0.5
    assert got["mrr"] == pytest.approx(0.75)
    assert got["recall_at_3"] == 1.0
    assert got["ndcg_at_10"] == pytest.approx((1 + 1 / math.log2(3)) / 2)


def test_released_recall_divides_by_pairs_and_hit_rate_by_rows():
    # One right answer; two rows, three (row, target) pairs: a row of two targets cannot score 1 as released.
    got = values(answer("ab", "abc", "abc"), answer("c", "abc", "bac"))
    assert got["recall_micro"] == pytest.approx(1 / 3)
    assert got["hit_rate"] == 0.5


def test_target_outside_the_list_caps_the_score():
    answers = [answer("a", "abc", "abc"), answer("z", "abc", "abc")]
    got = values(*answers)
    assert ceilings(judge(answers))["row"].value == 0.5
    assert got["hit_rate"] == 0.5
    assert got["hit_rate_in_list"] == 1.0
    assert got["recall_at_5"] == 0.5


def test_free_text_answers():
    # No id, an id that was not offered, a right one.
    got = values(answer("a", "abc", ""), answer("a", "abc", "z"), answer("a", "abc", "a"))
    assert got["valid_ratio"] == pytest.approx(1 / 3)
    assert got["hit_rate"] == pytest.approx(1 / 3)


def test_a_target_that_was_not_offered_is_a_hit_as_released_but_not_valid():
    got = values(answer("a", "bc", "a"))
    assert got["hit_rate"] == 1.0
    assert got["valid_ratio"] == 0.0


def test_ndcg_of_two_targets_is_one_only_in_the_best_order():
    assert values(answer("ab", "abcd", "bacd"))["ndcg_at_10"] == pytest.approx(1.0)
    worse = values(answer("ab", "abcd", "acbd"))["ndcg_at_10"]
    assert worse == pytest.approx((1 + 0.5) / (1 + 1 / math.log2(3)))


def test_repeated_ids_count_once():
    got = values(answer("aa", "abca", "aabc"))
    assert got["recall_micro"] == 1.0
    assert got["ndcg_at_5"] == pytest.approx(1.0)


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="no prediction"):
        judge([])
    with pytest.raises(ValueError, match="no targets"):
        judge([answer("", "abc", "abc")])


def slow(answers: list[Prediction]) -> dict[str, float]:
    """The definitions once more, row by row, in plain Python."""
    rows = []
    for a in answers:
        targets = set(a.targets)
        gains = [1 / math.log2(i + 2) if item in targets else 0.0 for i, item in enumerate(a.ranking)]
        best = [1 / math.log2(i + 2) for i in range(len(targets))]
        ranks = [i + 1 for i, item in enumerate(a.ranking) if item in targets]
        rows.append(
            {
                "hit_rate": float(a.ranking[0] in targets),
                "recall_at_3": len(targets & set(a.ranking[:3])) / len(targets),
                "recall_at_5": len(targets & set(a.ranking[:5])) / len(targets),
                "mrr": 1 / min(ranks) if ranks else 0.0,
                "ndcg_at_5": sum(gains[:5]) / sum(best[:5]),
                "ndcg_at_10": sum(gains[:10]) / sum(best[:10]),
            }
        )
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@st.composite
def random_answers(draw: st.DrawFn) -> list[Prediction]:
    answers = []
    for _ in range(draw(st.integers(1, 6))):
        candidates = draw(st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=12, unique=True))
        targets = draw(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=12, unique=True))
        answers.append(answer("".join(targets), "".join(candidates), "".join(draw(st.permutations(candidates)))))
    return answers


@settings(max_examples=150, deadline=None)
@given(random_answers())
@pytest.mark.slow
def test_against_the_slow_definitions(answers: list[Prediction]):
    got = values(*answers)
    for name, expected in slow(answers).items():
        assert got[name] == pytest.approx(expected), name
    assert got["hit_rate"] <= ceilings(judge(answers))["row"].value
    assert all(0 <= value <= 1 or math.isnan(value) for value in got.values())
