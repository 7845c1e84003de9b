"""Results out of order: what is given on, in which order, and where it waits."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import gettempdir

import pytest

from lavic.shards.pack.reorder_buffer import ReorderBuffer
from lavic.storage.output_folder import not_writable


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


def test_an_error_of_the_folder_for_temporary_files_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("w+b", buffering=0)  # noqa: SIM115 (closed by the buffer)
    monkeypatch.setattr("lavic.shards.pack.reorder_buffer.TemporaryFile", lambda **_: full)
    with (
        pytest.raises(OSError, match=f"No space left on device in {gettempdir()}, the folder of TMPDIR") as caught,
        ReorderBuffer(print, memory=0) as buffer,
    ):
        buffer.add(1, "x", 10)
    assert "folder of TMPDIR" in str(not_writable(Path("out"), caught.value))
