"""Records which step has the lowest validation loss."""

from __future__ import annotations

from dataclasses import replace

from lavic.train.callbacks.callback import Callback
from lavic.train.evaluation import EvalResult
from lavic.train.trainer import Trainer


class BestModel(Callback):
    """Sets `best_step` and `best_loss` of the trainer's state; the untrained model of step 0 does not count."""

    def post_eval(self, trainer: Trainer, result: EvalResult) -> None:
        """Compares with the best so far."""
        state = trainer.state
        if state.step > 0 and (state.best_loss is None or result.loss < state.best_loss):
            trainer.state = replace(state, best_step=state.step, best_loss=result.loss)
