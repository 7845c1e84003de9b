"""Results out of order: what is given on, in which order, and where it waits."""

from __future__ import annotations

import random

import pytest

from lavic.shards.pack.reorder_buffer import ReorderBuffer


@pytest.mark.parametrize("memory", [0, 2_500, 1 << 30])
def test_the_order_is_kept_wherever_results_wait(memory: int) -> None:
    given: list[tuple[int, bytes]] = []
    with ReorderBuffer(given.append, memory) as buffer:
        numbers = list(range(100))
        random.Random(0).shuffle(numbers)
        for number in numbers:
            buffer.add(number, (number, bytes([number]) * 1000), 1000)
        assert given == [(number, bytes([number]) * 1000) for number in range(100)]


def test_no_more_than_the_bound_is_held_in_memory_and_the_disk_is_used_again() -> None:
    given: list[int] = []
    with ReorderBuffer(given.append, memory=300) as buffer:
        for begin in (0, 10):
            for number in range(begin + 9, begin, -1):
                buffer.add(number, number, 100)
            assert buffer._bytes == 300 and len(buffer._on_disk) == 6 and buffer._end > 0
            buffer.add(begin, begin, 100)
            assert buffer._bytes == buffer._end == 0
    assert given == list(range(20))
