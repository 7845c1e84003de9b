"""Shows a run's progress on standard error: a bar in a terminal, about twenty lines in a log."""

from __future__ import annotations

import sys
from typing import Any

from lavic.tracking.progress import ProgressBar, progress_bar
from lavic.train.callbacks.callback import Callback
from lavic.train.evaluation import EvalResult
from lavic.train.nonfinite import NonFiniteError
from lavic.train.trainer import Trainer

LOG_LINES = 20
"""About how many lines of metrics a run writes to a log."""


class ConsoleLogger(Callback):
    """Writes on rank 0 alone."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None

    def pre_train(self, trainer: Trainer) -> None:
        step, total = trainer.state.step, trainer.total_steps
        self._bar = progress_bar(total, "steps", initial=step, shown=trainer.world.is_main)
        if step:
            self._write(trainer, f"resuming after step {step} of {total}")

    def post_eval(self, trainer: Trainer, result: EvalResult) -> None:
        """Shows the validation's perplexity and scores, and an early end of the run."""
        state = trainer.state
        scores = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in result.scores.items())
        self._write(trainer, f"step {state.step}: validation perplexity {result.perplexity:.4f}{scores}")
        if trainer.done and state.step < trainer.total_steps:
            self._write(
                trainer,
                f"step {state.step}: no better validation since step {state.best_step} (--loop.early-stopping-patience "
                f"{trainer.loop.early_stopping_patience}): training ends early",
            )

    def post_skipped_step(self, trainer: Trainer, error: NonFiniteError) -> None:
        """Shows the step and the samples because of which it was skipped."""
        self._write(
            trainer,
            f"step {trainer.state.step + 1} is skipped ({trainer.state.skipped_steps} of --loop.max-skipped "
            f"{trainer.loop.max_skipped}): the {error.quantity} of {error.samples} is not finite",
        )

    def log_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        step, total = trainer.state.step, trainer.total_steps
        if self._bar is None:
            return
        if not (sys.stderr.isatty() or step == total or step % max(1, total // LOG_LINES) == 0):
            return
        figures = [f"loss {metrics['loss']:.4f}" if "loss" in metrics else "skipped", f"lr {metrics['lr']:.2e}"]
        figures += [f"{metrics['samples_per_s']:.1f} samples/s"] if "samples_per_s" in metrics else []
        figures += [f"{metrics['mfu']:.0%} of peak"] if "mfu" in metrics else []
        self._bar.set_postfix_str(", ".join(figures), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()

    def _write(self, trainer: Trainer, line: str) -> None:
        if trainer.world.is_main:
            ProgressBar.write(line, file=sys.stderr)
