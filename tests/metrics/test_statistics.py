"""Intervals cover what they should, clusters widen them, and the exact tests match known values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lavic.metrics.bootstrap import Bootstrap, connected_clusters
from lavic.metrics.ranking_metrics import Ratio, calibration_error
from lavic.metrics.significance import holm, mcnemar, permutation_test


def hits(values: np.ndarray) -> dict[str, Ratio]:
    return {"hit": Ratio(values.astype(float), np.ones(len(values)))}


def test_connect_joins_through_others():
    keys = [{"s1", "a"}, {"s2", "b"}, {"s1", "c"}, {"s3", "b"}, {"s4", "d"}, {"s3", "c"}]
    assert connected_clusters(keys).tolist() == [0, 0, 0, 0, 1, 0]
    assert connected_clusters([{"a"}, {"b"}, {"a"}]).tolist() == [0, 1, 0]
    assert connected_clusters([set(), set()]).tolist() == [0, 1]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered, trials = np.random.default_rng(5), 0, 300
    for trial in range(trials):
        sample = rng.random(150) < 0.3
        interval = Bootstrap(np.arange(150), draws=400, seed=trial).intervals(hits(sample))["hit"]
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / trials <= 0.985


def test_clusters_are_resampled_whole():
    # 40 answers copied 10 times are 40 observations, not 400: the interval must be about sqrt(10) wider.
    values = np.repeat(np.random.default_rng(0).random(40) < 0.5, 10)
    clustered = Bootstrap(np.repeat(np.arange(40), 10)).intervals(hits(values))["hit"]
    naive = Bootstrap(np.arange(400)).intervals(hits(values))["hit"]
    assert clustered.value == naive.value
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(10**0.5, rel=0.15)
    assert (clustered.clusters, clustered.n, naive.clusters) == (40, 400, 400)


def test_a_ratio_of_sums_weighs_rows_by_their_denominator():
    terms = {"pairs": Ratio(np.array([1.0, 0.0]), np.array([1.0, 3.0]))}
    interval = Bootstrap(np.arange(2)).intervals(terms)["pairs"]
    assert interval.value == 0.25
    assert (interval.low, interval.high) == (0.0, 1.0)


@pytest.mark.parametrize(("hit", "low", "high"), [(True, 0.025**0.01, 1.0), (False, 0.0, 1 - 0.025**0.01)])
def test_unanimous_answers_are_not_certain(hit: bool, low: float, high: float):
    interval = Bootstrap(np.arange(100)).intervals(hits(np.full(100, hit)))["hit"]
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))


B20 = 0.025 ** (1 / 20)
"""The least share of a kind that 20 of 20 clusters have."""


@pytest.mark.parametrize(
    ("values", "clusters", "low", "high"),
    [
        ([1.0], [0], 0.025, 1.0),
        ([0.0], [0], 0.0, 0.975),
        ([0.25], [0], 0.25 * 0.025, 0.25 + 0.75 * 0.975),
        # All rows equal: all candidates tied, such as those of an arm that knows none of them.
        ([0.1] * 20, range(20), 0.1 * B20, 0.1 + 0.9 * (1 - B20)),
        # One cluster, whatever its rows are; and clusters that are equal though their rows are not.
        ([1.0, 0.0, 0.0, 1.0], [0] * 4, 0.5 * 0.025, 0.5 + 0.5 * 0.975),
        ([1.0, 0.0] * 20, np.repeat(range(20), 2), 0.5 * B20, 0.5 + 0.5 * (1 - B20)),
    ],
)
@pytest.mark.parametrize("draws", [1, 200])
def test_where_resamples_do_not_vary_other_clusters_may_be_as_frequent_as_an_unseen_kind(
    values: list[float], clusters: list[int], low: float, high: float, draws: int
):
    metric = hits(np.array(values))
    got = Bootstrap(np.array(clusters), draws=draws).intervals(metric)["hit"]
    assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))
    assert got.low <= got.value <= got.high
    # Three copies of a seed say no more than it does.
    copies = Bootstrap(np.array(clusters), draws=draws).pooled([metric] * 3)["hit"]
    assert (copies.low, copies.high) == (pytest.approx(low), pytest.approx(high))


def test_a_difference_that_does_not_vary_is_not_certain():
    ones, zeros = hits(np.ones(20)), hits(np.zeros(20))
    bootstrap = Bootstrap(np.arange(20), draws=200)
    got = bootstrap.pooled_differences([ones], [zeros])["hit"]
    assert (got.value, got.low, got.high) == (1.0, pytest.approx(2 * B20 - 1), 1.0)
    same = bootstrap.pooled_differences([ones], [ones])["hit"]
    assert (same.value, same.low, same.high) == (0.0, pytest.approx(B20 - 1), pytest.approx(1 - B20))
    alone = Bootstrap(np.arange(1), draws=200).pooled_differences([hits(np.ones(1))], [hits(np.zeros(1))])["hit"]
    assert (alone.low, alone.high) == (pytest.approx(-0.95), 1.0)  # one conversation shows nothing
    rng = np.random.default_rng(0)
    mixed = hits(rng.random(20) < 0.5)
    assert bootstrap.pooled_differences([mixed], [mixed])["hit"] == same  # both vary, their difference does not


def test_one_cluster_says_nothing_however_many_seeds_there_are():
    seeds = [hits(np.array([value, value])) for value in (0.25, 0.5, 0.75)]
    got = Bootstrap(np.zeros(2, dtype=np.int64), draws=500).pooled(seeds)["hit"]
    assert got.value == 0.5 and got.low < 0.025 and got.high > 0.975
    difference = Bootstrap(np.zeros(2, dtype=np.int64), draws=500).pooled_differences(seeds, seeds[1:])["hit"]
    assert difference.low < -0.9 and difference.high > 0.9


def test_a_calibration_error_of_one_conversation():
    ece = calibration_error(np.array([0.0]), np.array([0.9]))
    got = Bootstrap(np.arange(1), draws=100).intervals({"ece": ece})["ece"]
    assert (got.value, got.low, got.high) == (pytest.approx(0.9), 0.0, pytest.approx(0.9 + 0.1 * 0.975))


def test_a_value_has_bounds_though_no_resample_has_one():
    # One of 40 rows counts; a single resample leaves it out with probability 0.36.
    some = {"some": Ratio(np.eye(40)[0], np.eye(40)[0])}
    for seed in range(20):
        got = Bootstrap(np.arange(40), draws=1, seed=seed).intervals(some)["some"]
        assert (got.value, got.low, got.high) == (1.0, pytest.approx(0.025), 1.0)


def test_rows_that_do_not_count_are_left_out():
    terms = {"none": Ratio(np.zeros(5), np.zeros(5)), "some": Ratio(np.array([1.0, 0, 0, 0, 0]), np.eye(5)[0])}
    got = Bootstrap(np.arange(5)).intervals(terms)
    assert np.isnan([got["none"].value, got["none"].low, got["none"].high]).all()
    assert (got["some"].value, got["some"].n, got["some"].clusters) == (1.0, 1, 1)
    # One conversation that counts is one piece of evidence, however many others there are.
    assert (got["some"].low, got["some"].high) == (pytest.approx(0.025), 1.0)


def test_differences_are_paired():
    rng = np.random.default_rng(1)
    first = rng.random(300) < 0.6
    second = first.copy()
    second[:12] = False
    shift = Bootstrap(np.arange(300)).pooled_differences([hits(first)], [hits(second)])["hit"]
    alone = Bootstrap(np.arange(300)).intervals(hits(first))["hit"]
    assert shift.value == pytest.approx(first.mean() - second.mean())
    assert shift.low > 0
    assert shift.high - shift.low < 0.5 * (alone.high - alone.low)


def test_the_seed_decides():
    values = hits(np.random.default_rng(2).random(50) < 0.4)
    assert Bootstrap(np.arange(50), seed=3).intervals(values) == Bootstrap(np.arange(50), seed=3).intervals(values)
    assert Bootstrap(np.arange(50), seed=3).intervals(values) != Bootstrap(np.arange(50), seed=4).intervals(values)


def test_chunks_change_nothing_but_memory():
    # 40,000 clusters are drawn a hundred at a time; the interval is the normal one.
    values = np.random.default_rng(3).random(40_000) < 0.5
    interval = Bootstrap(np.arange(40_000), draws=500).intervals(hits(values))["hit"]
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 200, rel=0.15)


def test_mcnemar_exact():
    first = [True] * 10 + [False] * 2 + [True] * 30
    second = [False] * 10 + [True] * 2 + [True] * 30
    test = mcnemar(first, second)
    assert (test.first_only, test.second_only) == (10, 2)
    assert test.p == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar([True, False], [True, False]).p == 1.0
    assert mcnemar([True] * 3000, [False] * 3000).p == pytest.approx(0.0, abs=1e-300)
    many = mcnemar([True] * 10_100 + [False] * 9_900, [False] * 10_100 + [True] * 9_900)
    assert many.p == pytest.approx(math.erfc((200 - 1) / math.sqrt(2 * 20_000)), rel=1e-3)  # the normal approximation
    with pytest.raises(ValueError, match="same ones"):
        mcnemar([True], [True, False])


def test_holm():
    adjusted = holm({"a": 0.04, "b": 0.01, "c": 0.03})
    assert list(adjusted) == ["a", "b", "c"]
    assert adjusted == {"a": pytest.approx(0.06), "b": pytest.approx(0.03), "c": pytest.approx(0.06)}


def test_mcnemar_of_equal_counts_and_of_none_is_one():
    assert mcnemar([True] * 3 + [False] * 3, [False] * 3 + [True] * 3).p == 1.0
    assert mcnemar([True, True], [True, True]).p == 1.0


def ratio(values: list[float]) -> Ratio:
    return Ratio(np.array(values), np.ones(len(values)))


def test_permutation_test_is_exact_where_it_can_be():
    # Three equal gains: of the 8 exchanges, the observed one and its mirror are as extreme.
    first, second = ratio([1.0, 0.5, 0.5, 0.25]), ratio([0.5, 0.0, 0.0, 0.25])
    assert permutation_test(first, second, np.arange(4)) == pytest.approx(2 / 8)
    assert permutation_test(second, first, np.arange(4)) == pytest.approx(2 / 8)
    # As one cluster they are one observation.
    assert permutation_test(first, second, np.zeros(4, dtype=int)) == 1.0
    assert permutation_test(first, first, np.arange(4)) == 1.0
    with pytest.raises(ValueError, match="same conversations"):
        permutation_test(first, Ratio(first.numerator, np.array([1.0, 1, 1, 0])), np.arange(4))


def test_permutation_test_by_draws_agrees_with_the_exact_one():
    rng = np.random.default_rng(0)
    first, second = ratio(rng.random(12).tolist()), ratio((rng.random(12) * 0.6).tolist())
    exact = permutation_test(first, second, np.arange(12), draws=2**12)
    drawn = permutation_test(first, second, np.arange(12), draws=2**12 - 1)
    assert drawn == pytest.approx(exact, abs=0.03)
    assert permutation_test(ratio([1.0] * 40), ratio([0.0] * 40), np.arange(40), draws=999) == 1 / 1000


def test_a_true_null_over_dependent_conversations_is_rejected_as_often_as_it_should():
    # 30 threads of 10 conversations that go one way together. Conversations on their own would be rejected far more
    # often.
    rng, rejected, naive, trials = np.random.default_rng(1), 0, 0, 200
    clusters = np.repeat(np.arange(30), 10)
    for trial in range(trials):
        gain = np.repeat(rng.normal(size=30), 10) + 0.3 * rng.normal(size=300)
        pair = ratio(gain.tolist()), ratio([0.0] * 300)
        rejected += permutation_test(*pair, clusters, draws=200, seed=trial) <= 0.05
        naive += permutation_test(*pair, np.arange(300), draws=200, seed=trial) <= 0.05
    assert rejected / trials < 0.11
    assert naive / trials > 0.3


def test_calibration_error_is_resampled_by_bins():
    hits, confidence = np.array([1.0, 0.0, 1.0, 0.0]), np.array([0.9, 0.95, 0.2, 0.25])
    interval = Bootstrap(np.arange(4), draws=500).intervals({"ece": calibration_error(hits, confidence)})["ece"]
    assert interval.value == pytest.approx((abs(0.9 - 1 + 0.95) + abs(0.2 - 1 + 0.25)) / 4)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
