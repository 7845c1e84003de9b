"""The training data loader: which rank gets which sample in which micro-batch."""

from __future__ import annotations

import atexit
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError
from lavic.train.config import LoopSettings
from lavic.train.input.data_loader import TrainDataLoader, prefetch
from tests.train.toy import ToyData


def keys_by_step(size: int, loop: LoopSettings, first: int, last: int) -> list[list[str]]:
    """The keys of each step, over all ranks."""
    feeds = [TrainDataLoader(ToyData(40, 1), DistributedContext(rank=rank, size=size), loop) for rank in range(size)]
    steps = [list(feed.steps(first, last)) for feed in feeds]
    for step in range(last - first):
        assert len({len(rank[step]) for rank in steps}) == 1, "all ranks need the same number of micro-batches"
    return [sorted(key for rank in steps for micro in rank[step] for key in micro.keys) for step in range(last - first)]


@settings(deadline=None, max_examples=40)  # a busy machine is no failure
@given(
    size=st.sampled_from([1, 2, 3, 4]),
    micro_batch=st.integers(1, 14) | st.none(),
    micro_tokens=st.integers(1, 60) | st.none(),
    first=st.integers(0, 30),
    count=st.integers(1, 4),
)
def test_each_step_holds_its_positions_once_for_any_ranks(
    size: int, micro_batch: int | None, micro_tokens: int | None, first: int, count: int
) -> None:
    loop = LoopSettings(global_batch_size=12, micro_batch=micro_batch, micro_tokens=micro_tokens)
    expected = [sorted(f"toy-{p}" for p in range(12 * step, 12 * step + 12)) for step in range(first, first + count)]
    assert keys_by_step(size, loop, first, first + count) == expected


def test_worker_processes_give_the_same_batches() -> None:
    without_workers, with_workers = (
        LoopSettings(global_batch_size=8, micro_batch=3, micro_tokens=20, num_workers=workers) for workers in (0, 2)
    )
    expected, loaded = (
        list(TrainDataLoader(ToyData(40, 1), DistributedContext(), loop).steps(5, 9))
        for loop in (without_workers, with_workers)
    )
    for a, b in zip(expected, loaded, strict=True):
        assert [m.keys for m in a] == [m.keys for m in b]
        assert all((x.inputs == y.inputs).all() for x, y in zip(a, b, strict=True))


def test_samples_of_similar_length_share_a_micro_batch() -> None:
    (micros,) = TrainDataLoader(
        ToyData(40, 1), DistributedContext(), LoopSettings(global_batch_size=12, micro_batch=4)
    ).steps(0, 1)
    lengths = [n for micro in micros for n in micro.targets]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3


def test_every_micro_batch_keeps_the_token_budget() -> None:
    data = ToyData(40, 1)
    loop = LoopSettings(global_batch_size=12, micro_tokens=21)
    for rank in range(2):
        for micros in TrainDataLoader(data, DistributedContext(rank=rank, size=2), loop).steps(0, 5):
            assert len(micros) > 1
            for micro in micros:
                assert len(micro.keys) * (max(micro.targets) + data.overhead) <= 21


def test_an_empty_set_and_an_indivisible_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="training set is empty"):
        TrainDataLoader(ToyData(0, 1), DistributedContext(), LoopSettings())
    with pytest.raises(ConfigError, match=r"--loop.global-batch-size 9 cannot be shared by 2 processes"):
        TrainDataLoader(ToyData(5, 1), DistributedContext(size=2), LoopSettings(global_batch_size=9))


@pytest.mark.slow
def test_an_error_of_a_worker_ends_the_process() -> None:
    """Although the error that was printed, and with it the loader and its workers, exists until the exit."""
    code = (
        "from lavic.errors import DataError\n"
        "from lavic.train.input.data_loader import prefetch\n"
        "def make(number):\n"
        "    raise DataError('a bad sample')\n"
        "try:\n"
        "    next(prefetch(make, range(9), 1))\n"
        "except DataError as error:\n"
        "    printed = error\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_loader_that_is_closed_early_leaves_nothing_to_do_at_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[object] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(atexit, "unregister", at_exit.remove)
    batches = prefetch(abs, range(-4, 0), 0)
    assert next(batches) == 4 and len(at_exit) == 1
    batches.close()
    assert not at_exit


@pytest.mark.slow
def test_an_error_outside_the_loader_ends_the_process() -> None:
    """Its workers ignore the SIGTERM that Python sends at exit before it waits for them; they are killed silently."""
    code = (
        "import atexit, time\n"
        "atexit.register(time.sleep, 0.5)\n"  # runs last: when the workers have died
        "from lavic.train.input.data_loader import prefetch\n"
        "batches = prefetch(abs, range(-1000, 0), 1)\n"
        "next(batches)\n"
        "raise ValueError('a step failed')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and result.stderr.endswith("ValueError: a step failed\n")
