"""Callbacks: the order of hooks, errors, stop requests, console output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lavic.distributed.context import DistributedContext
from lavic.distributed.signals import StopRequest
from lavic.errors import Stopped
from lavic.tracking.journal import read_events, read_journal
from lavic.tracking.tracker import Tracker
from lavic.train.callbacks.callback import Callback
from lavic.train.checkpoint import CheckpointManager
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.nonfinite import NonFiniteError
from lavic.train.trainer import Trainer
from tests.train.toy import ToyData, ToyTask, make_callbacks

HOOKS = [name for name in vars(Callback) if not name.startswith("_") and name != "enter_phase"]
STEP = ["pre_load_batch", "post_load_batch", "pre_optim_step", "pre_log", "log_metrics", "post_step"]


def recorder(calls: list[str]) -> Callback:
    """A callback that records each hook."""

    def make(name: str) -> Any:
        return lambda self, trainer, *args: calls.append(name)

    return type("Recorder", (Callback,), {name: make(name) for name in HOOKS})()


def trainer(
    folder: Path, world: DistributedContext, steps: int, *callbacks: Callback, poison: int | None = None, **loop: Any
) -> Trainer:
    """A run of the toy with the callbacks of the commands and some more."""
    settings = LoopSettings(steps=steps, global_batch_size=8, **loop)
    tracker, checkpoints = Tracker.open(folder), CheckpointManager(folder / "checkpoints", world)
    stop = StopRequest()
    return Trainer(
        Engine(ToyTask(), world, settings),
        ToyData(40, 1, poison=poison),
        ToyData(13, 2),
        settings,
        world,
        [*make_callbacks(stop, checkpoints, tracker), *callbacks],
    )


def test_hooks_are_called_in_the_documented_order(tmp_path: Path, world: DistributedContext) -> None:
    calls: list[str] = []
    trainer(tmp_path, world, 2, recorder(calls), eval_every=1).fit()
    validation = ["pre_eval", "pre_eval_batch", "post_eval"]
    last = [*STEP[:-1], "post_checkpoint_saved", "post_step"]
    saved = ["post_checkpoint_saved", *validation]  # a checkpoint precedes each validation
    assert calls == ["pre_train", *validation, *STEP, *saved, *last, *validation, "close"]


def test_a_skipped_step_calls_its_hook_and_is_logged(tmp_path: Path, world: DistributedContext) -> None:
    calls: list[str] = []
    trainer(tmp_path, world, 2, recorder(calls), poison=3, max_skipped=1).fit()
    first = calls[calls.index("pre_load_batch") :][: len(STEP) + 1]
    assert first == [*STEP[:3], "post_skipped_step", *STEP[3:]]
    assert [event["step"] for event in read_events(tmp_path / "metrics.jsonl", "skipped_step")] == [1]


def test_callbacks_are_closed_after_an_error(tmp_path: Path, world: DistributedContext) -> None:
    calls: list[str] = []
    run = trainer(tmp_path, world, 2, recorder(calls), poison=3)
    hooks = dict(run.engine.task._forward_hooks)
    with pytest.raises(NonFiniteError):
        run.fit()
    assert calls[-1] == "close" and "post_step" not in calls
    assert run.engine.task._forward_hooks == hooks, "the throughput meter is still attached"


class StopAt(Callback):
    """Asks the trainer to stop in a step, as a time limit would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def pre_optim_step(self, trainer: Trainer) -> None:
        trainer.stop_requested = trainer.state.step + 1 == self.step


def test_a_callback_can_stop_a_run_that_then_resumes(tmp_path: Path, world: DistributedContext) -> None:
    calls: list[str] = []
    with pytest.raises(Stopped):
        trainer(tmp_path, world, 5, StopAt(3), recorder(calls)).fit()
    assert calls[-3:] == ["post_checkpoint_saved", "on_stop", "close"]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    state = trainer(tmp_path, world, 5).fit()
    assert state.step == 5
    assert [row["step"] for row in read_journal(tmp_path / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4, 5]


class FailAt(Callback):
    """Ends a run by an error in a step, as a lost node would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def pre_optim_step(self, trainer: Trainer) -> None:
        if trainer.state.step + 1 == self.step:
            raise RuntimeError("lost")


def test_a_run_never_resumes_from_before_a_validation(tmp_path: Path, world: DistributedContext) -> None:
    """Which may have replaced the bundle: with another learning rate or other ranks its steps would not be repeated."""
    with pytest.raises(RuntimeError, match="lost"):
        trainer(tmp_path, world, 12, FailAt(8), eval_every=3, save_every=4).fit()
    validated = [row["step"] for row in read_journal(tmp_path / "metrics.jsonl") if "valid_loss" in row]
    assert validated == [0, 3, 6]
    trainer(tmp_path, world, 12, eval_every=3, save_every=4).fit()
    assert [event["step"] for event in read_events(tmp_path / "metrics.jsonl", "resume")] == [0, 6]


def test_console_output_is_thinned(
    tmp_path: Path, world: DistributedContext, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, world, 60).fit()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 30, "one line per step"
    assert any(line.startswith("step 60: validation perplexity ") for line in lines)
    assert any(line.startswith("60/60 steps") and "loss" in line and "samples/s" in line for line in lines)
