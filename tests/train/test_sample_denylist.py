"""Samples and steps that are left out, so that a run with a loss that is not finite can go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError
from lavic.tracking.journal import read_events, read_journal
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.input.sample_denylist import DenylistDataset, read_denylist
from lavic.train.nonfinite import NonFiniteError
from lavic.train.train_step import train_step
from tests.train.conftest import Start, curve, weights
from tests.train.toy import ToyBatch, ToyData, ToyTask

LOOP = {
    "steps": 6,
    "global_batch_size": 8,
    "lr": 0.01,
    "schedule": "constant",
    "warmup": 0.0,
    "save_every": 2,
    "max_grad_norm": 0.0,
}


def plain_weights(loop: LoopSettings, steps: list[list[int]]) -> dict[str, list]:
    """What plain PyTorch learns from the given samples of each step."""
    task, data = ToyTask(), ToyData(40, 1)
    adam = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=loop.lr, weight_decay=0.0)
    for positions in steps:
        batch = data.collate([data[p] for p in positions])
        (task(batch).sum() / sum(batch.targets)).backward()
        adam.step()
        adam.zero_grad()
    return {name: p.tolist() for name, p in task.named_parameters()}


def assert_learnt(folder: Path, expected: dict[str, list]) -> None:
    learnt = weights(folder)
    for name in expected:
        torch.testing.assert_close(torch.tensor(learnt[name]), torch.tensor(expected[name]), rtol=0, atol=1e-6)


def step_of(number: int) -> list[int]:
    return list(range(8 * number, 8 * number + 8))


# --- samples --------------------------------------------------------------------------------------------


def test_a_list_is_read_as_people_write_it(tmp_path: Path) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes("\ufeffB01/0\r\n\r\n  B02/1 \r\nB01/0\r\nÄ3".encode())
    assert read_denylist(file) == ("B01/0", "B02/1", "Ä3")
    assert read_denylist(None) == ()
    with pytest.raises(ConfigError, match=r"--loop.skip-samples .*none.txt: no such file"):
        read_denylist(tmp_path / "none.txt")


def test_the_next_sample_takes_the_place() -> None:
    data = ToyData(10, 1)
    kept = DenylistDataset(data, ["toy-3", "toy-4", "toy-9", "other"])
    read = [kept[p].key for p in range(10)]
    assert read == [kept.key(p) for p in range(10)]
    assert [int(key.removeprefix("toy-")) for key in read] == [0, 1, 2, 5, 5, 5, 6, 7, 8, 10]
    assert kept.lengths(range(10)) == [kept[p].length for p in range(10)]
    assert len(kept) == 10
    assert kept.unknown() == ["other"]
    with pytest.raises(ConfigError, match="lists every sample"):
        DenylistDataset(data, [data.key(p) for p in range(10)]).unknown()


@pytest.mark.dist
def test_a_run_goes_on_without_the_sample_that_ended_it(tmp_path: Path, start: Start) -> None:
    run = start(tmp_path, 2, LOOP, poison=35)
    assert run.wait() == [1, 1]
    assert "the loss of toy-35 on rank 1 is not finite" in run.stderr[0]
    assert "--loop.skip-samples" in run.stderr[0]
    bad = tmp_path / "bad.txt"
    bad.write_text("toy-35\ntoy-x\n")
    run = start(tmp_path, 2, {**LOOP, "skip_samples": str(bad)}, poison=35)
    assert run.wait() == [0, 0]
    (event,) = read_events(tmp_path / "metrics.jsonl", "skip_samples")
    assert event["keys"] == ["toy-35", "toy-x"] and event["samples"] == 1
    assert "1 of 2 keys are not in the training set: toy-x" in run.stderr[0]
    fifth = [p if p != 35 else 36 for p in step_of(4)]
    assert_learnt(tmp_path, plain_weights(LoopSettings(**LOOP), [*map(step_of, range(4)), fifth, step_of(5)]))


# --- steps ----------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_a_step_is_left_out_on_all_ranks_and_the_run_is_the_same_however_it_is_stopped(
    tmp_path: Path, start: Start
) -> None:
    loop = {**LOOP, "max_skipped": 1}
    runs = [
        start(tmp_path / "whole", 2, loop, poison=19),
        start(tmp_path / "cut", 2, loop, poison=19, signal="SIGTERM", at=4),
    ]
    assert [run.wait() for run in runs] == [[0, 0], [75, 75]]
    progress = json.loads((tmp_path / "cut/checkpoints/step-000004/progress.json").read_text())
    assert (progress["step"], progress["samples"], progress["skipped_steps"]) == (4, 32, 1)
    assert start(tmp_path / "cut", 2, loop, poison=19).wait() == [0, 0]

    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert_learnt(tmp_path / "whole", plain_weights(LoopSettings(**LOOP), [step_of(n) for n in (0, 1, 3, 4, 5)]))
    (event,) = read_events(tmp_path / "whole/metrics.jsonl", "skipped_step")
    assert (event["step"], event["reason"], event["samples"]) == (3, "loss", "toy-19 on rank 1")
    rows = {row["step"]: row for row in read_journal(tmp_path / "whole/metrics.jsonl") if "lr" in row}
    assert list(rows) == [1, 2, 3, 4, 5, 6]
    assert rows[3]["skipped_steps"] == 1 and "loss" not in rows[3] and "loss" in rows[4]
    assert "step 3 is skipped (1 of --loop.max-skipped 1): the loss of toy-19 on rank 1" in runs[0].stderr[0]


@pytest.mark.dist
def test_more_steps_than_allowed_end_the_run(tmp_path: Path, start: Start) -> None:
    """Over all starts: the first one is in the checkpoint."""
    loop = {**LOOP, "max_skipped": 1}
    assert start(tmp_path, 1, loop, poison=3, signal="SIGTERM", at=2).wait() == [75]
    run = start(tmp_path, 1, loop, poison=35)
    assert run.wait() == [1]
    assert "the loss of toy-35 on rank 0 is not finite" in run.stderr[0]


class Cliff(ToyTask):
    """The loss of an input of 7 is not finite; its gradient is."""

    def forward(self, batch: ToyBatch) -> torch.Tensor:
        endless = torch.where(batch.inputs[:, 0] == 7.0, torch.inf, 0.0)
        return super().forward(batch) + endless


class Steep(ToyTask):
    """The loss of an input of 7 is finite; its gradient is not."""

    def forward(self, batch: ToyBatch) -> torch.Tensor:
        steep = torch.sqrt((7.0 - batch.inputs[:, 0]).abs() * self.second.bias[0].exp())
        return super().forward(batch) + steep * 0.0


@pytest.mark.parametrize("task", [Cliff, Steep])
def test_a_step_that_was_not_taken_leaves_nothing_behind(task: type[ToyTask], world: DistributedContext) -> None:
    data, learnt = ToyData(16, 1), []
    for bad in (False, True):
        model = task()
        engine = Engine(model, world, LoopSettings(global_batch_size=4, micro_batch=2))
        for pairs in (((1, 2), (3, 4)), ((5, 6), (8, 9)), ((10, 11), (12, 13))):
            micros = [data.collate([data[n] for n in pair]) for pair in pairs]
            if pairs[0] != (5, 6):
                train_step(engine, micros, 0.01, world)
            elif bad:
                micros[0].inputs[0, 0] = 7.0
                with pytest.raises(NonFiniteError, match=r"of toy-(5, toy-)?6 on"):
                    train_step(engine, micros, 0.01, world)
        engine.close()
        learnt.append([p.tolist() for p in model.parameters()])
    assert learnt[0] == learnt[1]
