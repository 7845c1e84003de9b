"""Callbacks: the order of hooks, errors, stop requests, console output."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lavic.distributed.context import DistributedContext
from lavic.distributed.signals import StopRequest
from lavic.errors import LavicError, Stopped
from lavic.tracking.journal import read_events, read_journal
from lavic.tracking.tracker import Tracker
from lavic.train.callbacks.callback import Callback
from lavic.train.checkpoint import CheckpointManager
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.nonfinite import NonFiniteError
from lavic.train.train_step import NoTargetsError
from lavic.train.trainer import Trainer
from tests.train.toy import ToyData, ToySample, ToyTask, make_callbacks

HOOKS = [name for name in vars(Callback) if not name.startswith("_") and name != "enter_phase"]
STEP = ["pre_load_batch", "post_load_batch", "pre_optim_step", "pre_log", "log_metrics", "post_step"]


def recorder(calls: list[str]) -> Callback:
    """A callback that records each hook."""

    def make(name: str) -> Any:
        return lambda self, trainer, *args: calls.append(name)

    return type("Recorder", (Callback,), {name: make(name) for name in HOOKS})()


def trainer(
    folder: Path,
    world: DistributedContext,
    steps: int,
    *callbacks: Callback,
    poison: int | None = None,
    data: ToyData | None = None,
    valid: ToyData | None = None,
    **loop: Any,
) -> Trainer:
    """A run of the toy with the callbacks of the commands and some more."""
    settings = LoopSettings(steps=steps, global_batch_size=8, **loop)
    tracker, checkpoints = Tracker.open(folder), CheckpointManager(folder / "checkpoints", world)
    stop = StopRequest()
    return Trainer(
        Engine(ToyTask(), world, settings),
        data or ToyData(40, 1, poison=poison),
        valid or ToyData(13, 2),
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


def test_a_validation_loss_that_is_not_finite_ends_the_run(tmp_path: Path, world: DistributedContext) -> None:
    """No later loss is lower than it: its model would stay the best one."""
    with pytest.raises(LavicError, match="the validation loss of toy-3 on rank 0 is not finite"):
        trainer(tmp_path, world, 2, valid=ToyData(13, 2, poison=3)).fit()


class PartlyUntargeted(ToyData):
    """No sample of some steps has a target."""

    def __init__(self, *steps: int) -> None:
        super().__init__(40, 1)
        self.steps = steps

    def __getitem__(self, position: int) -> ToySample:
        sample = super().__getitem__(position)
        untargeted = position // 8 + 1 in self.steps
        return replace(sample, inputs=sample.inputs[:0], labels=sample.labels[:0]) if untargeted else sample


def test_a_step_without_targets_changes_no_weight(tmp_path: Path, world: DistributedContext) -> None:
    """By chance a small step may have only samples without a target: that is no reason to end a training."""
    data, loop = PartlyUntargeted(1, 4), {"eval_every": 1, "lr": 0.01, "save_every": 1}
    uninterrupted = trainer(tmp_path / "uninterrupted", world, 6, data=data, **loop)
    state = uninterrupted.fit()
    assert (state.step, state.empty_steps, state.updates) == (6, 2, 4)
    rows = {row["step"]: row for row in read_journal(tmp_path / "uninterrupted" / "metrics.jsonl") if "lr" in row}
    assert [step for step, row in rows.items() if "loss" not in row] == [1, 4]
    assert (rows[4]["skipped"], rows[4]["empty_steps"]) == (8, 2)
    with pytest.raises(Stopped):
        trainer(tmp_path / "stopped", world, 6, StopAt(4), data=data, **loop).fit()
    resumed = trainer(tmp_path / "stopped", world, 6, data=data, **loop)
    assert resumed.fit() == state
    for name, weight in uninterrupted.engine.parameters.items():
        assert torch.equal(weight, resumed.engine.parameters[name]), name


def test_first_steps_without_any_target_end_the_run(tmp_path: Path, world: DistributedContext) -> None:
    for steps, last in ((3, 3), (20, 8)):
        run = trainer(tmp_path / str(steps), world, steps, data=PartlyUntargeted(*range(1, 21)), eval_every=1)
        with pytest.raises(NoTargetsError, match=r"are the photos described \(`lavic describe`\)"):
            run.fit()
        assert run.state.step == last - 1 and run.state.best_step is None


def test_console_output_is_thinned(
    tmp_path: Path, world: DistributedContext, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, world, 60).fit()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 30, "one line per step"
    assert any(line.startswith("step 60: validation perplexity ") for line in lines)
    assert any(line.startswith("60/60 steps") and "loss" in line and "samples/s" in line for line in lines)
