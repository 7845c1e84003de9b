"""Throughput over all ranks: samples and tokens per second, padding, data wait, memory, stragglers, utilisation."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from lavic.distributed.context import DistributedContext

T = TypeVar("T")

_FIELDS = ("samples", "tokens", "padded", "flops", "wait", "forward", "peak")


class ThroughputMeter:
    """Measures the forward passes of a task since the last reading.

    Forward hooks record each batch and its time. In a forward pass a rank does not wait for others, so ranks are
    compared by their time for data and forward passes.

    Args:
        task: Takes a `MicroBatch`.
        world: The ranks.
        flops: Floating point operations of a batch, forward and backward; None leaves utilisation out.
        peak: Peak operations per second of one rank's device; None, for a CPU, leaves utilisation out.
    """

    def __init__(
        self,
        task: nn.Module,
        world: DistributedContext,
        *,
        flops: Callable[[Any], float] | None = None,
        peak: float | None = None,
    ) -> None:
        self._world = world
        self._device = next(task.parameters()).device
        self._flops, self._peak = flops, peak
        self._hooks = [task.register_forward_pre_hook(self._begin), task.register_forward_hook(self._end)]
        self.restart()

    def restart(self) -> None:
        """Restarts the measurement: time before, such as that of a validation or a save, does not count."""
        self._start = time.perf_counter()
        self._sums = dict.fromkeys(_FIELDS, 0.0)
        self._spans: list[tuple[Any, Any]] = []
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def wait(self, batches: Iterator[T]) -> T:
        """The next batch; the time until it comes counts as data wait."""
        requested = time.perf_counter()
        batch = next(batches)
        self.add_wait(time.perf_counter() - requested)
        return batch

    def add_wait(self, seconds: float) -> None:
        """Counts time spent waiting for data."""
        self._sums["wait"] += seconds

    def read(self) -> dict[str, float]:
        """The figures since the last reading, then restarts. Collective.

        Returns:
            samples_per_s: Over all ranks.
            tokens_per_s: Over all ranks, without padding.
            padding: Share of padding in all tokens.
            data_wait: Share of the time spent waiting for data, mean over the ranks.
            peak_gib: Most memory of any rank, GiB: allocated on the GPU since the last reading; on a CPU, the process's
                peak since its start.
            rank_spread: Time for data and forward passes of the slowest rank, divided by that of the median rank.
            mfu: Model FLOPs utilisation, see `flops`; only with a peak.
        """
        local = {**self._sums, "peak": self._peak_bytes()}
        # The events are complete: the step's loss has been read.
        local["forward"] += sum(self._seconds(*span) for span in self._spans)
        table = torch.zeros(self._world.size, len(_FIELDS), dtype=torch.float64)
        table[self._world.rank] = torch.tensor([local[name] for name in _FIELDS], dtype=torch.float64)
        by_rank = dict(zip(_FIELDS, self._world.all_reduce(table).T.tolist(), strict=True))
        seconds = time.perf_counter() - self._start
        busy = [wait + forward for wait, forward in zip(by_rank["wait"], by_rank["forward"], strict=True)]
        total = {name: sum(values) for name, values in by_rank.items()}
        figures = {
            "samples_per_s": total["samples"] / seconds,
            "tokens_per_s": total["tokens"] / seconds,
            "padding": 1 - total["tokens"] / max(1.0, total["padded"]),
            "data_wait": total["wait"] / self._world.size / seconds,
            "peak_gib": max(by_rank["peak"]) / 2**30,
            "rank_spread": max(busy) / max(statistics.median(busy), 1e-9),
        }
        if self._flops and self._peak:
            figures["mfu"] = total["flops"] / (seconds * self._world.size * self._peak)
        self.restart()
        return figures

    def close(self) -> None:
        """Removes the hooks from the task."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> ThroughputMeter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(self, task: nn.Module, batches: tuple[Any, ...]) -> None:
        self._forward_start = self._now()

    def _end(self, task: nn.Module, batches: tuple[Any, ...], output: torch.Tensor) -> None:
        (batch,) = batches
        self._spans.append((self._forward_start, self._now()))
        self._sums["samples"] += len(batch.keys)
        self._sums["tokens"] += batch.tokens
        self._sums["padded"] += batch.padded
        if self._flops:
            self._sums["flops"] += self._flops(batch)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000

    def _peak_bytes(self) -> float:
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
