"""The order of training samples: a permutation per epoch, local, and the same in every version."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavic.train.input.shuffle_order import ShuffleOrder


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 5), st.integers(0, 3), st.integers(1, 70), st.integers(1, 5))
def test_each_epoch_is_a_permutation(n: int, seed: int, epoch: int, block: int, mix: int) -> None:
    permutation = ShuffleOrder(n, seed, block, mix).epoch(epoch)
    assert sorted(permutation) == list(range(n))
    order = ShuffleOrder(n, seed, block, mix)
    offsets = [0, n // 2, n - 1]
    assert [order.at(epoch * n + offset) for offset in offsets] == [permutation[offset] for offset in offsets]


def test_the_order_is_the_same_in_every_version() -> None:
    # These numbers must never change: a resumed run continues in the order of its start.
    assert ShuffleOrder(10, 0, 2).epoch(0).tolist() == [8, 9, 6, 4, 5, 2, 0, 3, 7, 1]
    first = ShuffleOrder(100, 0).epoch(0).tolist()
    assert first != ShuffleOrder(100, 1).epoch(0).tolist() and first != ShuffleOrder(100, 0).epoch(1).tolist()


def test_windows_mix_a_few_blocks() -> None:
    n, block, mix = 10_000, 50, 4
    permutation = ShuffleOrder(n, 3, block, mix).epoch(0)
    window = permutation[: block * mix]
    assert len({index // block for index in window}) == mix
    assert len({index // block for index in permutation[:block]}) > 1


def test_a_late_position_computes_one_window_only() -> None:
    order = ShuffleOrder(100_000_000, 0)
    assert 0 <= order.at(3 * 100_000_000 + 71_234_567) < 100_000_000
