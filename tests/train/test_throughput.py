"""Throughput measurements and their journal entries."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lavic.distributed.context import DistributedContext
from lavic.tracking.journal import read_journal
from lavic.train.measure.throughput import ThroughputMeter
from tests.train.conftest import Start
from tests.train.toy import ToyBatch, ToyData, ToyTask


@dataclass(frozen=True)
class HalfPaddedBatch(ToyBatch):
    """Its padded length is twice its tokens."""

    @property
    def padded(self) -> int:
        return 2 * self.tokens


def batches(seconds: float) -> Iterator[ToyBatch]:
    data = ToyData(40, 1)
    for start in range(0, 40, 8):
        time.sleep(seconds)
        yield HalfPaddedBatch(**vars(data.collate([data[p] for p in range(start, start + 8)])))


def test_throughput_since_the_last_reading() -> None:
    task, feed = ToyTask(), batches(0.05)
    with ThroughputMeter(task, DistributedContext(), flops=lambda batch: 100.0 * batch.tokens, peak=1e6) as meter:
        task(next(feed))  # before restart: not counted
        meter.restart()
        start = time.perf_counter()
        loaded = [meter.wait(feed) for _ in range(2)]
        for batch in loaded:
            task(batch)
        figures = meter.read()
        seconds = time.perf_counter() - start
        second_reading = meter.read()
    tokens = sum(batch.tokens for batch in loaded)
    assert figures["samples_per_s"] * seconds == pytest.approx(16, rel=0.2)
    assert figures["tokens_per_s"] / figures["samples_per_s"] == pytest.approx(tokens / 16)
    assert figures["padding"] == pytest.approx(0.5)
    assert figures["mfu"] == pytest.approx(100 * figures["tokens_per_s"] / 1e6)
    assert 0 < figures["data_wait"] <= 1
    assert figures["data_wait"] * seconds >= 0.09
    assert figures["rank_spread"] == 1
    assert figures["peak_gib"] > 0.01
    assert second_reading["samples_per_s"] == 0
    task(loaded[0])
    assert not task._forward_hooks, "the hook is still attached"


def test_mfu_is_omitted_without_a_peak() -> None:
    task = ToyTask()
    with ThroughputMeter(task, DistributedContext(), flops=lambda batch: 1.0, peak=None) as meter:
        task(next(batches(0)))
        assert "mfu" not in meter.read()


class ThreeTimesSlowerRank(DistributedContext):
    """This rank and one that takes three times as long."""

    def all_reduce(self, value: torch.Tensor) -> torch.Tensor:
        return value + 3 * value.roll(1, 0)


def test_rank_spread_is_the_slowest_over_the_median() -> None:
    task = ToyTask()
    with ThroughputMeter(task, ThreeTimesSlowerRank(size=2)) as meter:
        task(meter.wait(batches(0.02)))
        assert meter.read()["rank_spread"] == pytest.approx(1.5)  # over the median of 1 and 3


@pytest.mark.dist
def test_every_step_logs_throughput_with_two_ranks(tmp_path: Path, start: Start) -> None:
    loop = {"steps": 3, "global_batch_size": 8, "micro_tokens": 21, "num_workers": 1}
    assert start(tmp_path, 2, loop).wait() == [0, 0]
    rows = [row for row in read_journal(tmp_path / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert {"samples_per_s", "tokens_per_s", "padding", "data_wait", "peak_gib", "rank_spread"} <= row.keys()
        assert row["rank_spread"] >= 1
