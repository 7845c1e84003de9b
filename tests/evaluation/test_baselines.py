"""Baselines that count: no help from the order of the list."""

from __future__ import annotations

from lavic.evaluation.baselines import count_targets, list_order, popularity, repeat_last


def test_popularity_counts_and_leaves_equals_tied():
    counts = count_targets([["c"], ["c", "b"], ["z"]])
    ranked = popularity(["a", "b", "c", "d"], counts)
    assert (ranked.ids, ranked.scores) == (("c", "b", "a", "d"), (2.0, 1.0, 0.0, 0.0))
    assert list_order(["b", "a", "b"]).ids == ("b", "a")


def test_the_last_named_item_comes_first_and_the_rest_is_tied():
    ranked = repeat_last(["a", "b", "c", "d"], ["b", "c", "b", "z"])
    assert (ranked.ids, ranked.scores) == (("b", "c", "a", "d"), (3.0, 2.0, 0.0, 0.0))
    assert set(repeat_last(["a", "b"], []).scores) == {0.0}
