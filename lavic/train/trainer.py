"""The training loop of both stages. Their differences are in the task and its data; everything else is a callback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lavic.distributed.context import DistributedContext
from lavic.errors import Stopped
from lavic.train.callbacks.callback import Callback
from lavic.train.checkpoint import TrainState
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.evaluation import Scorer, evaluate, inference
from lavic.train.input.collate import MicroBatch
from lavic.train.input.data_loader import TaskDataset, TrainDataLoader
from lavic.train.nonfinite import NonFiniteError
from lavic.train.train_step import NoTargetsError, train_step

_EMPTY_STEPS = 8
"""First steps without any target after which training ends: a step may have none by chance, if it has few samples."""


class Trainer:
    """Trains a task to the end of its run.

    The loss of a step is the mean over the target tokens of all ranks and micro-batches: it does not depend on how the
    step's samples are split. With the same world size, a resumed run gives exactly the same losses.

    Args:
        callbacks: Called in this order, see `Callback`; the same on every rank.
        scorer: Computes scores at each validation, besides the loss.

    Raises:
        ConfigError: The training set is empty, or the ranks cannot share a batch.

    Attributes:
        engine: With the task.
        loop: The settings.
        world: The ranks.
        state: The run's progress.
        total_steps: Of the run.
        stop_requested: Whether this rank has a stop request; the ranks agree on it in each step.
    """

    def __init__(
        self,
        engine: Engine,
        train: TaskDataset,
        valid: TaskDataset,
        loop: LoopSettings,
        world: DistributedContext,
        callbacks: Sequence[Callback] = (),
        scorer: Scorer | None = None,
    ) -> None:
        self.engine, self.loop, self.world = engine, loop, world
        self.state = TrainState()
        self.total_steps = loop.total_steps(len(train))
        self.stop_requested = False
        self._feed, self._valid = TrainDataLoader(train, world, loop), valid
        self._samples_per_epoch = len(train)
        self._callbacks, self._scorer = tuple(callbacks), scorer

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.state.samples / self._samples_per_epoch

    @property
    def done(self) -> bool:
        """Whether the last step is done, or training stops early (`loop.early_stopping_patience`)."""
        state, patience = self.state, self.loop.early_stopping_patience
        return state.step >= self.total_steps or 0 < patience <= state.validations_since_best

    def fit(self) -> TrainState:
        """Trains to the end, or until early stopping. Collective.

        Returns:
            The final state.

        Raises:
            Stopped: On request.
            NonFiniteError: More than `loop.max_skipped` steps had a loss or gradient that is not finite; names the
                samples.
            NoTargetsError: The first steps have no target token.
        """
        try:
            self.notify("pre_train")
            batches = self._feed.steps(self.state.step, self.total_steps)
            while True:
                if self._eval_due():
                    self._evaluate()
                if self.done:
                    return self.state
                self._step(batches)
        finally:
            self.notify("close")

    def notify(self, hook: str, *args: Any) -> None:
        """Calls a hook of every callback."""
        for callback in self._callbacks:
            getattr(callback, hook)(self, *args)

    def enter_phase(self, phase: str) -> None:
        """Notifies the callbacks that this rank begins a part of the run."""
        self.notify("enter_phase", phase)

    def _eval_due(self) -> bool:
        step, eval_every = self.state.step, self.loop.eval_every
        due = step in (0, self.total_steps) or (eval_every and step % eval_every == 0)
        return bool(due) and self.state.validated < step

    def _evaluate(self) -> None:
        step = self.state.step
        self.notify("pre_eval")

        def check_stop() -> None:
            self.notify("pre_eval_batch")

        try:
            result = evaluate(
                self.engine.task,
                self._valid,
                self.world,
                batch_size=self._feed.micro_batch,
                device=self.engine.device,
                max_tokens=self.loop.micro_tokens,
                num_workers=self.loop.num_workers,
                check_stop=check_stop,
                enter_phase=lambda phase: self.enter_phase(f"{phase} of the validation after step {step}"),
            )
            if self._scorer is not None:
                self.enter_phase(f"the scores of the validation after step {step}")
                with inference(self.engine.task):
                    result = replace(result, scores=self._scorer(check_stop))
        except Stopped:
            self.notify("on_stop")
            raise
        self.state = replace(self.state, validated=step)
        self.notify("post_eval", result)

    def _step(self, batches: Iterator[list[MicroBatch]]) -> None:
        step = self.state.step + 1
        self.enter_phase(f"the samples of step {step}")
        self.notify("pre_load_batch")
        micro_batches = next(batches)
        self.notify("post_load_batch")
        metrics: dict[str, Any] = {"lr": self.loop.learning_rate(step, self.total_steps)}
        try:
            result = train_step(
                self.engine,
                micro_batches,
                metrics["lr"],
                self.world,
                seed=(self.loop.seed, step - 1),
                stop_requested=self._stop_requested,
                enter_phase=lambda phase: self.enter_phase(f"{phase} of step {step}"),
            )
        except NonFiniteError as error:
            if self.state.skipped_steps >= self.loop.max_skipped:
                raise
            self.state = replace(self.state, skipped_steps=self.state.skipped_steps + 1)
            self.notify("post_skipped_step", error)
            metrics["skipped_steps"] = self.state.skipped_steps
            stop = error.stop
        except NoTargetsError as error:
            empty = self.state.empty_steps + 1
            if empty == step >= min(_EMPTY_STEPS, self.total_steps):  # no step had a target
                raise
            self.state = replace(self.state, empty_steps=empty)
            metrics |= {"skipped": self.loop.global_batch_size, "empty_steps": empty}
            stop = error.stop
        else:
            metrics |= {"loss": result.loss, "grad_norm": result.grad_norm}
            metrics |= {"skipped": result.skipped} if result.skipped else {}
            stop = result.stop
        self.state = replace(self.state, step=step, samples=self.state.samples + self.loop.global_batch_size)
        if step % self.loop.log_every == 0 or step == self.total_steps:
            self.notify("pre_log", metrics)
            self.notify("log_metrics", metrics)
        self.notify("post_step")
        if stop:
            self.notify("on_stop")
            raise Stopped

    def _stop_requested(self) -> bool:
        self.notify("pre_optim_step")
        return self.stop_requested
