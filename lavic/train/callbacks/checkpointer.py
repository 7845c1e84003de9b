"""Loads the newest complete checkpoint and saves new ones."""

from __future__ import annotations

from lavic.train.callbacks.callback import Callback
from lavic.train.checkpoint import CheckpointManager
from lavic.train.trainer import Trainer


class Checkpointer(Callback):
    """Saves every `loop.save_every` steps, before a validation, after the last step and on a stop request.

    A validation may replace the bundle, and a run never resumes from before its bundle. It comes before the callbacks
    that look at `trainer.state` in `pre_train`.
    """

    def __init__(self, checkpoints: CheckpointManager) -> None:
        self._checkpoints = checkpoints
        self._saved_step = 0

    def pre_train(self, trainer: Trainer) -> None:
        """Continues from the newest complete checkpoint.

        Raises:
            ConfigError: It belongs to another model or other data.
        """
        trainer.state = self._checkpoints.load(trainer.engine) or trainer.state
        self._saved_step = trainer.state.step

    def pre_eval(self, trainer: Trainer) -> None:
        """Saves what is validated."""
        self.on_stop(trainer)

    def post_step(self, trainer: Trainer) -> None:
        step = trainer.state.step
        if step % trainer.loop.save_every == 0 or step == trainer.total_steps:
            self._save(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        """Saves the steps since the last checkpoint."""
        if trainer.state.step > self._saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.enter_phase(f"the checkpoint after step {trainer.state.step}")
        path = self._checkpoints.save(trainer.engine, trainer.state)
        self._saved_step = trainer.state.step
        trainer.notify("post_checkpoint_saved", path)
