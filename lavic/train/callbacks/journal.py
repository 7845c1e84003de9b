"""Writes a run's metrics and events to its journal."""

from __future__ import annotations

from typing import Any

from lavic.tracking.tracker import Tracker
from lavic.train.callbacks.callback import Callback
from lavic.train.evaluation import EvalResult
from lavic.train.nonfinite import NonFiniteError
from lavic.train.trainer import Trainer


class JournalLogger(Callback):
    """Reports to a tracker; on ranks other than 0 that is the null tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def pre_train(self, trainer: Trainer) -> None:
        """Records the step that the run resumes from, which voids later records of an earlier start."""
        self._tracker.event("resume", step=trainer.state.step, total=trainer.total_steps)

    def post_eval(self, trainer: Trainer, result: EvalResult) -> None:
        """Writes the validation's loss, perplexity and scores, and an early end of the run."""
        state = trainer.state
        scores = {f"valid_{name}": value for name, value in result.scores.items()}
        self._tracker.log(
            state.step, epoch=trainer.epoch, valid_loss=result.loss, valid_perplexity=result.perplexity, **scores
        )
        if trainer.done and state.step < trainer.total_steps:
            self._tracker.event("early_stop", step=state.step, best_step=state.best_step)

    def post_skipped_step(self, trainer: Trainer, error: NonFiniteError) -> None:
        """Writes the step and the samples because of which it was skipped."""
        self._tracker.event("skipped_step", step=trainer.state.step + 1, reason=error.quantity, samples=error.samples)

    def log_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._tracker.log(trainer.state.step, **metrics)
