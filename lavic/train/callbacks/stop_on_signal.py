"""Stops a run on SIGTERM, SIGUSR1 or Ctrl-C, at the end of a step."""

from __future__ import annotations

from lavic.distributed.signals import StopRequest
from lavic.train.callbacks.callback import Callback
from lavic.train.trainer import Trainer


class StopOnSignal(Callback):
    """Passes a stop request on to the trainer."""

    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def pre_eval_batch(self, trainer: Trainer) -> None:
        """Stops within a validation too, which may take longer than the scheduler waits. Collective."""
        self._request.raise_if_requested(trainer.world)

    def pre_optim_step(self, trainer: Trainer) -> None:
        """Sets this rank's flag; the step's all-reduce shares it with the other ranks."""
        trainer.stop_requested |= self._request.requested
