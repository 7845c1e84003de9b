"""What a step costs, over all ranks: rates, padding, waiting, memory, stragglers, utilisation."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn

from lavic.distributed.context import DistributedContext

T = TypeVar("T")

_FIELDS = ("samples", "tokens", "padded", "flops", "wait", "forward", "peak")


class Meter:
    """Measures the passes of a task since the last reading.

    It listens to the task's forward calls: each tells its batch and its time. A forward pass is the part of a step in
    which a rank waits for no other one, so ranks are compared by the time they take for data and forward passes.
    """

    def __init__(
        self,
        task: nn.Module,
        world: DistributedContext,
        *,
        flops: Callable[[Any], float] | None = None,
        peak: float | None = None,
    ) -> None:
        """Begins to listen.

        Args:
            task: Takes a `Minibatch`; on a GPU or not.
            world: The ranks.
            flops: Floating point operations of a batch, backward pass included; None leaves utilisation out.
            peak: Operations per second that one rank's device can do; None, for a CPU, leaves utilisation out.
        """
        self._world = world
        self._device = next(task.parameters()).device
        self._flops, self._peak = flops, peak
        self._hooks = [task.register_forward_pre_hook(self._begin), task.register_forward_hook(self._end)]
        self.restart()

    def restart(self) -> None:
        """Begins anew: what came before, such as validating and saving, does not count."""
        self._start = time.perf_counter()
        self._sums = dict.fromkeys(_FIELDS, 0.0)
        self._spans: list[tuple[Any, Any]] = []
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def wait(self, batches: Iterator[T]) -> T:
        """The next of the batches; the time it takes to come is time spent on data."""
        asked = time.perf_counter()
        batch = next(batches)
        self._sums["wait"] += time.perf_counter() - asked
        return batch

    def read(self) -> dict[str, float]:
        """The figures since the last reading. Collective; begins anew.

        Returns:
            samples_per_s: Over all ranks.
            tokens_per_s: Over all ranks, without padding.
            padding: Share of padding in all tokens.
            data_wait: Share of the time spent waiting for data, mean over the ranks.
            peak_gib: Most memory on any rank, GiB: allocated on the GPU since the last reading; without one, the
                process's own since its start.
            rank_spread: Time for data and forward passes, of the slowest rank over that of the median one.
            mfu: Share of the devices' peak that went into the model, see `flops`; where there is a peak.
        """
        mine = {**self._sums, "peak": self._peak_bytes()}
        # events have times once the step that they belong to is done: its loss has been read
        mine["forward"] += sum(self._seconds(*span) for span in self._spans)
        table = torch.zeros(self._world.size, len(_FIELDS), dtype=torch.float64)
        table[self._world.rank] = torch.tensor([mine[name] for name in _FIELDS], dtype=torch.float64)
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

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, task: nn.Module, batches: tuple[Any, ...]) -> None:
        self._began = self._now()

    def _end(self, task: nn.Module, batches: tuple[Any, ...], output: torch.Tensor) -> None:
        (batch,) = batches
        self._spans.append((self._began, self._now()))
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
