"""Stops a run on SIGTERM, SIGUSR1 or Ctrl-C, at the end of a step."""

from __future__ import annotations

from lavic.distributed.signals import StopRequest
from lavic.train.callbacks.callback import Callback
from lavic.train.trainer import Trainer


class StopOnSignal(Callback):
    """Hands a stop request on to the trainer."""

    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def pre_eval_batch(self, trainer: Trainer) -> None:
        """A validation of a large set takes longer than a scheduler waits. Collective."""
        self._request.raise_if_requested(trainer.world)

    def pre_optim_step(self, trainer: Trainer) -> None:
        """The ranks agree on it as part of the step's own reduction."""
        trainer.stop_requested |= self._request.requested
