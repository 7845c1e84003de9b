"""Length buckets: every sample once, within the token budget, equally many micro-steps on every rank."""

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
def test_buckets_hold_every_sample_once_within_the_token_budget(lengths, tokens, most, overhead) -> None:
    groups = bucket_by_length(lengths, max_tokens=tokens, max_samples=most, overhead=overhead)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or cost(group, lengths, overhead) <= tokens
        assert most is None or len(group) <= most


def test_without_a_budget_there_is_one_bucket() -> None:
    assert bucket_by_length([3, 1, 2]) == [[1, 2, 0]]
    assert bucket_by_length([]) == []


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 8), st.integers(500, 20_000), st.integers(1, 9) | st.none(), st.integers(0, 200))
def test_ranks_get_every_sample_once_and_equally_many_micro_steps(lengths, ranks, tokens, most, overhead) -> None:
    lengths = lengths * ranks  # divisible by the ranks
    shares = balance_micro_batches(lengths, ranks, max_tokens=tokens, max_samples=most, overhead=overhead)
    assert sorted(i for groups in shares for group in groups for i in group) == list(range(len(lengths)))
    assert len({len(groups) for groups in shares}) == 1
    groups = [group for share in shares for group in share]
    assert all(groups)
    if len(groups) < len(lengths):  # else nothing is left to split
        limit = max(tokens, max(lengths) + overhead)  # the longest sample alone may exceed the budget
        assert all(cost(group, lengths, overhead) <= limit for group in groups)
        assert most is None or all(len(group) <= most for group in groups)
    assert shares == balance_micro_batches(lengths, ranks, max_tokens=tokens, max_samples=most, overhead=overhead), (
        "the result is deterministic"
    )


def test_balancing_evens_ranks_and_reduces_padding() -> None:
    """Prompts of 400 to 2,000 tokens, against ranks that each sort and split their own share."""
    rng = random.Random(1)
    spread: dict[str, list[float]] = {"separate": [], "balanced": []}
    waste: dict[str, list[float]] = {"separate": [], "balanced": []}
    for _ in range(50):
        lengths = [min(2000, 400 + round(rng.expovariate(1 / 400))) for _ in range(64)]
        balanced = balance_micro_batches(lengths, 8, max_tokens=4096)
        separate = []
        for share in (sorted(range(rank, 64, 8), key=lambda i: lengths[i]) for rank in range(8)):
            size = -(-len(share) // len(balanced[0]))
            separate.append([share[start : start + size] for start in range(0, len(share), size)])
        for name, shares in (("separate", separate), ("balanced", balanced)):
            work = [sum(cost(group, lengths) for group in groups) for groups in shares]
            spread[name].append(max(work) / (sum(work) / 8))
            waste[name].append(1 - sum(lengths) / sum(work))
    assert sum(spread["balanced"]) / 50 < 1.05 < 1.25 < sum(spread["separate"]) / 50
    assert sum(waste["balanced"]) / 50 < 0.05 < 0.2 < sum(waste["separate"]) / 50


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples cannot be shared by 4 ranks"):
        balance_micro_batches([1, 2, 3], 4, max_tokens=10)
