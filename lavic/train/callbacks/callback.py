"""The hooks of the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavic.train.evaluation import EvalResult
    from lavic.train.nonfinite import NonFiniteError
    from lavic.train.trainer import Trainer


class Callback:
    """Base class: every hook does nothing, and a subclass overrides those that it needs.

    The trainer calls the hooks on every rank, in the order of its list of callbacks, so a hook may be collective. One
    step of the loop:

        pre_eval, pre_eval_batch (several), post_eval       where a validation is due
        pre_load_batch, post_load_batch
        pre_optim_step, or post_skipped_step in its place
        pre_log, log_metrics                                where the step is logged
        post_step
        on_stop                                             where a rank was asked to stop
    """

    def pre_train(self, trainer: Trainer) -> None:
        """Before the first step; a callback that loads a checkpoint sets `trainer.state` here."""

    def pre_eval(self, trainer: Trainer) -> None:
        """Before a validation."""

    def pre_eval_batch(self, trainer: Trainer) -> None:
        """Every few batches of a validation; may raise `Stopped` on all ranks."""

    def post_eval(self, trainer: Trainer, result: EvalResult) -> None:
        """After a validation."""

    def pre_load_batch(self, trainer: Trainer) -> None:
        """Before the step's micro-batches are taken from the data loader."""

    def post_load_batch(self, trainer: Trainer) -> None:
        """After the step's micro-batches were taken from the data loader."""

    def pre_optim_step(self, trainer: Trainer) -> None:
        """After the last backward pass. A `trainer.stop_requested` that is set later counts for the next step."""

    def post_skipped_step(self, trainer: Trainer, error: NonFiniteError) -> None:
        """After a step that changed no weight, because its loss or gradient is not finite."""

    def pre_log(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Before `log_metrics`: adds to the step's metrics."""

    def log_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Every `loop.log_every` steps and after the last one."""

    def post_step(self, trainer: Trainer) -> None:
        """After a step, skipped or not; it has been logged."""

    def post_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint was written."""

    def on_stop(self, trainer: Trainer) -> None:
        """Before the run stops on request, after a step or during a validation."""

    def enter_phase(self, trainer: Trainer, phase: str) -> None:
        """When this rank begins another part of the run, such as "forward 2 of step 7"; the same on all ranks."""

    def close(self, trainer: Trainer) -> None:
        """After the run, however it ended; `pre_train` may not have been called."""
