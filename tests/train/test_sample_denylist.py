"""Skipped samples and skipped steps: a run with a non-finite loss continues."""

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
    """Weights that plain PyTorch learns from the given samples of each step."""
    task, data = ToyTask(), ToyData(40, 1)
    adam = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=loop.lr, weight_decay=0.0)
    for positions in steps:
        batch = data.collate([data[p] for p in positions])
        (task(batch).sum() / sum(batch.targets)).backward()
        adam.step()
        adam.zero_grad()
    return {name: p.tolist() for name, p in task.named_parameters()}


def assert_weights(folder: Path, expected: dict[str, list]) -> None:
    actual = weights(folder)
    for name in expected:
        torch.testing.assert_close(torch.tensor(actual[name]), torch.tensor(expected[name]), rtol=0, atol=1e-6)


def positions_of_step(number: int) -> list[int]:
    return list(range(8 * number, 8 * number + 8))


# --- samples --------------------------------------------------------------------------------------------


def test_read_denylist_ignores_bom_blanks_and_repeats(tmp_path: Path) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes("\ufeffB01/0\r\n\r\n  B02/1 \r\nB01/0\r\nÄ3".encode())
    assert read_denylist(file) == ("B01/0", "B02/1", "Ä3")
    assert read_denylist(None) == ()
    with pytest.raises(ConfigError, match=r"--loop.skip-samples .*none.txt: no such file"):
        read_denylist(tmp_path / "none.txt")


def test_a_skipped_sample_is_replaced_by_the_next() -> None:
    data = ToyData(10, 1)
    filtered = DenylistDataset(data, ["toy-3", "toy-4", "toy-9", "other"])
    keys = [filtered[p].key for p in range(10)]
    assert keys == [filtered.key(p) for p in range(10)]
    assert [int(key.removeprefix("toy-")) for key in keys] == [0, 1, 2, 5, 5, 5, 6, 7, 8, 10]
    assert filtered.lengths(range(10)) == [filtered[p].length for p in range(10)]
    assert len(filtered) == 10
    assert filtered.unknown() == ["other"]
    with pytest.raises(ConfigError, match="lists every sample"):
        DenylistDataset(data, [data.key(p) for p in range(10)]).unknown()


@pytest.mark.dist
def test_skip_samples_resumes_a_run_without_the_bad_sample(tmp_path: Path, start: Start) -> None:
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
    fifth = [p if p != 35 else 36 for p in positions_of_step(4)]
    steps = [*map(positions_of_step, range(4)), fifth, positions_of_step(5)]
    assert_weights(tmp_path, plain_weights(LoopSettings(**LOOP), steps))


# --- steps ----------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_a_nonfinite_step_is_skipped_on_all_ranks_also_after_a_stop(tmp_path: Path, start: Start) -> None:
    loop = {**LOOP, "max_skipped": 1}
    runs = [
        start(tmp_path / "uninterrupted", 2, loop, poison=19),
        start(tmp_path / "stopped", 2, loop, poison=19, signal="SIGTERM", at=4),
    ]
    assert [run.wait() for run in runs] == [[0, 0], [75, 75]]
    progress = json.loads((tmp_path / "stopped/checkpoints/step-000004/progress.json").read_text())
    assert (progress["step"], progress["samples"], progress["skipped_steps"]) == (4, 32, 1)
    assert start(tmp_path / "stopped", 2, loop, poison=19).wait() == [0, 0]

    assert curve(tmp_path / "stopped") == curve(tmp_path / "uninterrupted")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "uninterrupted")
    steps = [positions_of_step(n) for n in (0, 1, 3, 4, 5)]
    assert_weights(tmp_path / "uninterrupted", plain_weights(LoopSettings(**LOOP), steps))
    (event,) = read_events(tmp_path / "uninterrupted/metrics.jsonl", "skipped_step")
    assert (event["step"], event["reason"], event["samples"]) == (3, "loss", "toy-19 on rank 1")
    rows = {row["step"]: row for row in read_journal(tmp_path / "uninterrupted/metrics.jsonl") if "lr" in row}
    assert list(rows) == [1, 2, 3, 4, 5, 6]
    assert rows[3]["skipped_steps"] == 1 and "loss" not in rows[3] and "loss" in rows[4]
    assert "step 3 is skipped (1 of --loop.max-skipped 1): the loss of toy-19 on rank 1" in runs[0].stderr[0]


@pytest.mark.dist
def test_more_than_max_skipped_steps_end_the_run(tmp_path: Path, start: Start) -> None:
    """Counted over all starts: the first skipped step is in the checkpoint."""
    loop = {**LOOP, "max_skipped": 1}
    assert start(tmp_path, 1, loop, poison=3, signal="SIGTERM", at=2).wait() == [75]
    run = start(tmp_path, 1, loop, poison=35)
    assert run.wait() == [1]
    assert "the loss of toy-35 on rank 0 is not finite" in run.stderr[0]


class InfiniteLossTask(ToyTask):
    """The loss of an input of 7 is not finite; its gradient is."""

    def forward(self, batch: ToyBatch) -> torch.Tensor:
        endless = torch.where(batch.inputs[:, 0] == 7.0, torch.inf, 0.0)
        return super().forward(batch) + endless


class InfiniteGradientTask(ToyTask):
    """The loss of an input of 7 is finite; its gradient is not."""

    def forward(self, batch: ToyBatch) -> torch.Tensor:
        steep = torch.sqrt((7.0 - batch.inputs[:, 0]).abs() * self.second.bias[0].exp())
        return super().forward(batch) + steep * 0.0


@pytest.mark.parametrize("task", [InfiniteLossTask, InfiniteGradientTask])
def test_a_skipped_step_leaves_weights_and_optimizer_unchanged(task: type[ToyTask], world: DistributedContext) -> None:
    data, results = ToyData(16, 1), []
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
        results.append([p.tolist() for p in model.parameters()])
    assert results[0] == results[1]
