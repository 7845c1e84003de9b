"""Tournaments: long lists ranked in groups, and the ranking from their results."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from lavic.data.schema import Conversation
from lavic.evaluation.predictions import FILE, read_predictions, write_predictions
from lavic.evaluation.test_set import TestSet
from lavic.metrics.relevance import judge
from lavic.recommend.ranking.ranked_list import RankedList
from lavic.recommend.ranking.tournament import Tournament


def run(weights: dict[str, float], size: int) -> tuple[Tournament, list[list[tuple[str, ...]]]]:
    """A tournament with a scorer that satisfies Luce's choice axiom."""
    tournament, rounds = Tournament(list(weights), size), []
    while tournament.groups:
        rounds.append(tournament.groups)
        rankings = []
        for group in tournament.groups:
            ids = sorted(group, key=lambda item: -weights[item])
            total = sum(weights[item] for item in ids)
            rankings.append(RankedList(ids=tuple(ids), logprobs=tuple(math.log(weights[item] / total) for item in ids)))
        tournament.advance(rankings)
    return tournament, rounds


@pytest.mark.parametrize(("count", "size"), [(1, 10), (10, 10), (11, 10), (20, 10), (95, 10), (101, 10), (7, 2)])
def test_the_distribution_of_a_consistent_scorer_is_restored(count: int, size: int):
    rng = random.Random(count)
    weights = {f"i{number}": rng.expovariate(1) + 1e-9 for number in range(count)}
    tournament, rounds = run(weights, size)
    ranking = tournament.ranking
    assert list(ranking.ids) == sorted(weights, key=lambda item: -weights[item])
    total = sum(weights.values())
    assert ranking.probabilities == pytest.approx([weights[item] / total for item in ranking.ids])
    assert all(len(group) <= size for groups in rounds for group in groups)
    assert sorted(item for group in rounds[0] for item in group) == sorted(weights)
    assert len(rounds[-1]) == 1 and tournament.prompts == sum(map(len, rounds))


def test_group_sizes_differ_by_at_most_one_and_neighbours_are_separated():
    groups = Tournament([f"i{number}" for number in range(23)], 10).groups
    assert sorted(map(len, groups)) == [7, 8, 8]
    assert groups[0][:2] == ("i0", "i3")


def test_number_of_prompts_per_round():
    weights = {f"i{number}": 1.0 + number for number in range(100)}
    assert [len(groups) for groups in run(weights, 10)[1]] == [10, 1]
    weights = {f"i{number}": 1.0 + number for number in range(1000)}
    assert [len(groups) for groups in run(weights, 10)[1]] == [100, 10, 1]


def test_one_group_keeps_its_ranking():
    tournament = Tournament(["a", "b", "c"], 10)
    tournament.advance([RankedList(ids=("c", "a", "b"), logprobs=(-1.0, -2.0, -2.0), none=0.25)])
    assert not tournament.groups and tournament.ranking.ids == ("c", "a", "b")
    assert tournament.ranking.logprobs == (-1.0, -2.0, -2.0) and tournament.ranking.none == 0.25


def test_probabilities_too_small_for_a_float_stay_in_order():
    weights = {f"i{number}": number for number in range(30)}
    tournament = Tournament(list(weights), 10)
    while tournament.groups:
        tournament.advance(
            [
                RankedList(
                    ids=tuple(sorted(group, key=lambda item: -weights[item])),
                    logprobs=tuple(sorted((1000.0 * weights[item] - 90000 for item in group), reverse=True)),
                )
                for group in tournament.groups
            ]
        )
    ranking = tournament.ranking
    assert ranking.ids == tuple(f"i{number}" for number in reversed(range(30)))
    assert len(ranking.scores) == 30 and all(before > after for before, after in pairwise(ranking.scores))
    assert ranking.probabilities[-1] == 0


def test_scores_are_the_logarithms_of_the_probabilities():
    ranking = run({f"i{number}": 1.0 + number for number in range(25)}, 10)[0].ranking
    assert ranking.scores == pytest.approx([math.log(probability) for probability in ranking.probabilities])


def test_a_list_in_groups_has_the_same_metrics_when_read_from_a_file(tmp_path: Path):
    """A sure model gives most candidates less probability than a file of nine digits shows: they are no ties."""
    weights = {f"i{number}": 1000.0**-number for number in range(25)}
    ranking = run(weights, 10)[0].ranking
    target = ranking.ids[12]
    test_set = TestSet(
        name="test",
        file=tmp_path / "test.jsonl",
        sha256="",
        conversations=(Conversation(id="test-0", turns=(), targets=(target,)),),
        lists=(tuple(weights),),
    )
    write_predictions(tmp_path / FILE, [test_set], {"test": {"photos": [ranking]}}, "both")
    read = judge(read_predictions(tmp_path)["test"].predictions("photos"))
    assert read.reciprocal_rank == judge(test_set.predictions([ranking])).reciprocal_rank == 1 / 13


def test_an_empty_list_needs_no_prompt():
    assert not Tournament([], 10).groups and Tournament([], 10).ranking.ids == ()


def test_halve_splits_the_list_into_smaller_groups():
    weights = {f"i{number}": 1.0 + number for number in range(10)}
    tournament = Tournament(list(weights), 10)
    while max(map(len, tournament.groups)) > 3:
        assert tournament.halve()
    assert sorted(item for group in tournament.groups for item in group) == sorted(weights)
    while tournament.groups:
        assert max(map(len, tournament.groups)) <= 3
        rankings = []
        for group in tournament.groups:
            ids = sorted(group, key=lambda item: -weights[item])
            total = sum(weights[item] for item in ids)
            rankings.append(RankedList(ids=tuple(ids), logprobs=tuple(math.log(weights[item] / total) for item in ids)))
        tournament.advance(rankings)
    assert tournament.ranking.probabilities == pytest.approx([number / 55 for number in range(10, 0, -1)])
    assert not Tournament(["a", "b"], 2).halve()
