"""Adds samples/s, padding, data wait, memory and utilisation to the metrics of a step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lavic.train.callbacks.callback import Callback
from lavic.train.evaluation import EvalResult
from lavic.train.measure.flops import make_flops_counter
from lavic.train.measure.peak_flops import peak_flops
from lavic.train.measure.throughput import ThroughputMeter
from lavic.train.nonfinite import NonFiniteError
from lavic.train.trainer import Trainer


class ThroughputMonitor(Callback):
    """Measures training alone: validations, checkpoints and skipped steps do not count.

    It comes last, so that the time other callbacks take after a validation does not count either.
    """

    def __init__(self) -> None:
        self._meter: ThroughputMeter | None = None
        self._requested = 0.0

    @property
    def meter(self) -> ThroughputMeter:
        """The open meter."""
        assert self._meter is not None, "pre_train comes first"
        return self._meter

    def pre_train(self, trainer: Trainer) -> None:
        task = trainer.engine.task
        peak = peak_flops(trainer.engine.device, next(task.parameters()).dtype)
        self._meter = ThroughputMeter(task, trainer.world, flops=make_flops_counter(task), peak=peak)

    def pre_load_batch(self, trainer: Trainer) -> None:
        self._requested = time.perf_counter()

    def post_load_batch(self, trainer: Trainer) -> None:
        self.meter.add_wait(time.perf_counter() - self._requested)

    def pre_log(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Adds the figures since the last reading. Collective."""
        metrics |= self.meter.read()

    def post_eval(self, trainer: Trainer, result: EvalResult) -> None:
        self.meter.restart()

    def post_skipped_step(self, trainer: Trainer, error: NonFiniteError) -> None:
        self.meter.restart()

    def post_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        self.meter.restart()

    def close(self, trainer: Trainer) -> None:
        if self._meter is not None:
            self._meter.close()
