"""Cutting and dealing a step: nothing lost, the budget kept, as many micro-steps on every rank."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavic.train.input.length_bucketing import balance_micro_batches, bucket_by_length

LENGTHS = st.lists(st.integers(1, 2000), min_size=1, max_size=60)


def cost(group: list[int], lengths: list[int], overhead: int = 0) -> int:
    return len(group) * (max(lengths[i] for i in group) + overhead)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5000), st.integers(1, 9) | st.none(), st.integers(0, 200))
def test_groups_hold_every_sample_once_and_keep_the_budget(lengths, tokens, most, overhead) -> None:
    groups = bucket_by_length(lengths, tokens=tokens, most=most, overhead=overhead)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or cost(group, lengths, overhead) <= tokens
        assert most is None or len(group) <= most


def test_without_a_budget_there_is_one_group() -> None:
    assert bucket_by_length([3, 1, 2]) == [[1, 2, 0]]
    assert bucket_by_length([]) == []


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 8), st.integers(500, 20_000), st.integers(1, 9) | st.none(), st.integers(0, 200))
def test_a_step_is_dealt_once_with_as_many_micro_steps_on_every_rank(lengths, ranks, tokens, most, overhead) -> None:
    lengths = lengths * ranks  # what ranks can share
    shares = balance_micro_batches(lengths, ranks, tokens=tokens, most=most, overhead=overhead)
    assert sorted(i for groups in shares for group in groups for i in group) == list(range(len(lengths)))
    assert len({len(groups) for groups in shares}) == 1
    groups = [group for share in shares for group in share]
    assert all(groups)
    if len(groups) < len(lengths):  # else there is nothing left to split
        limit = max(tokens, max(lengths) + overhead)  # what its longest sample costs alone, a step costs anyway
        assert all(cost(group, lengths, overhead) <= limit for group in groups)
        assert most is None or all(len(group) <= most for group in groups)
    assert shares == balance_micro_batches(lengths, ranks, tokens=tokens, most=most, overhead=overhead), (
        "a plan is a pure function"
    )


def test_ranks_are_even_and_little_is_padding() -> None:
    """Prompts as LaViC's, 400 to 2,000 tokens: against ranks that each sort and cut a share of their own."""
    rng = random.Random(1)
    spread: dict[str, list[float]] = {"alone": [], "dealt": []}
    waste: dict[str, list[float]] = {"alone": [], "dealt": []}
    for _ in range(50):
        lengths = [min(2000, 400 + round(rng.expovariate(1 / 400))) for _ in range(64)]
        dealt = balance_micro_batches(lengths, 8, tokens=4096)
        alone = []
        for share in (sorted(range(rank, 64, 8), key=lambda i: lengths[i]) for rank in range(8)):
            size = -(-len(share) // len(dealt[0]))
            alone.append([share[start : start + size] for start in range(0, len(share), size)])
        for name, shares in (("alone", alone), ("dealt", dealt)):
            work = [sum(cost(group, lengths) for group in groups) for groups in shares]
            spread[name].append(max(work) / (sum(work) / 8))
            waste[name].append(1 - sum(lengths) / sum(work))
    assert sum(spread["dealt"]) / 50 < 1.05 < 1.25 < sum(spread["alone"]) / 50
    assert sum(waste["dealt"]) / 50 < 0.05 < 0.2 < sum(waste["alone"]) / 50


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples cannot be shared by 4 ranks"):
        balance_micro_batches([1, 2, 3], 4, tokens=10)
