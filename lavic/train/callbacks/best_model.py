"""Records which step has the best validation."""

from __future__ import annotations

from dataclasses import replace

from lavic.train.callbacks.callback import Callback
from lavic.train.checkpoint import TrainState
from lavic.train.evaluation import EvalResult
from lavic.train.trainer import Trainer


class BestModel(Callback):
    """Keeps `best_step`, `best_loss`, `best_score` and `validations_since_best` of the trainer's state.

    The untrained model does not count.

    Args:
        score: Name of the score in `EvalResult.scores` whose highest value is best. The loss decides between equal
            values, since a score over a few hundred lists takes few values. None: the lowest loss is best.
    """

    def __init__(self, score: str | None = None) -> None:
        self._score = score

    def post_eval(self, trainer: Trainer, result: EvalResult) -> None:
        state = trainer.state
        if state.updates == 0:
            return
        score = None if self._score is None else result.scores[self._score]
        if _better(score, result.loss, state):
            trainer.state = replace(
                state, best_step=state.step, best_loss=result.loss, best_score=score, validations_since_best=0
            )
        else:
            trainer.state = replace(state, validations_since_best=state.validations_since_best + 1)


def _better(score: float | None, loss: float, best: TrainState) -> bool:
    if best.best_loss is None:
        return True
    if score is not None and best.best_score is not None and score != best.best_score:
        return score > best.best_score
    return loss < best.best_loss
