"""The loop in real processes: the same result however a step is split. Interruptions: test_restart.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lavic.distributed.context import DistributedContext
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.evaluation import evaluate
from lavic.train.train_step import train_step
from tests.train.conftest import Start, curve, weights
from tests.train.toy import Options, ToyData, ToyTask, train

LOOP = {
    "steps": 12,
    "global_batch_size": 8,
    "lr": 0.01,
    "weight_decay": 0.01,
    "eval_every": 5,
    "save_every": 4,
    "warmup": 2.0,
    "max_grad_norm": 0.5,
}

pytestmark = pytest.mark.dist


def assert_close(actual: list[dict], expected: list[dict], tolerance: float) -> None:
    assert [(row["step"], *sorted(row)) for row in actual] == [(row["step"], *sorted(row)) for row in expected]
    for a, b in zip(actual, expected, strict=True):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=tolerance), (a["step"], key)


def assert_same_weights(actual: dict, expected: dict, tolerance: float) -> None:
    for name in actual:
        torch.testing.assert_close(torch.tensor(actual[name]), torch.tensor(expected[name]), rtol=0, atol=tolerance)


def plain_run(loop: LoopSettings) -> tuple[list[float], list[float], dict]:
    """Training without DeepSpeed, ranks or batches: one sample after the other."""
    task, data = ToyTask(), ToyData(40, 1)
    trained = [p for p in task.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=loop.lr, weight_decay=loop.weight_decay)
    losses, norms = [], []
    for step in range(12):
        samples = [data[p] for p in range(8 * step, 8 * step + 8)]
        tokens = sum(s.length for s in samples)
        total = 0.0
        for sample in samples:
            loss = task(data.collate([sample])).sum() / tokens
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, loop.max_grad_norm)))
        adam.param_groups[0]["lr"] = loop.learning_rate(step + 1, 12)
        adam.step()
        adam.zero_grad()
    return losses, norms, {name: p.tolist() for name, p in task.named_parameters()}


def test_result_does_not_depend_on_ranks_and_micro_steps(tmp_path: Path, start: Start) -> None:
    one_rank, two_ranks = tmp_path / "one", tmp_path / "two"
    runs = [start(one_rank, 1, LOOP), start(two_ranks, 2, {**LOOP, "micro_batch": 1, "num_workers": 1})]
    assert [run.wait() for run in runs] == [[0], [0, 0]]
    assert_close(curve(two_ranks), curve(one_rank), 1e-6)
    assert_same_weights(weights(two_ranks), weights(one_rank), 1e-6)

    losses, norms, last = plain_run(LoopSettings(**LOOP))
    steps = [row for row in curve(two_ranks) if "loss" in row]
    assert [row["loss"] for row in steps] == pytest.approx(losses, rel=1e-6)
    assert [row["grad_norm"] for row in steps] == pytest.approx(norms, rel=1e-6)
    assert_same_weights(weights(two_ranks), last, 1e-6)
    assert max(norms) > LOOP["max_grad_norm"], "nothing was clipped: the test does not cover clipping"


def gradient(folder: Path) -> torch.Tensor:
    """Gradient of the only step of a run: Adam's first moment is a tenth of it."""
    state = load_file(folder / "checkpoints" / "step-000001" / "state.safetensors")
    return 10 * torch.cat([value.flatten() for key, value in sorted(state.items()) if key.endswith("/exp_avg")])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_bfloat16_gradients_do_not_depend_on_ranks(
    tmp_path: Path, start: Start, world: DistributedContext, accumulation: int
) -> None:
    """Each sample's gradient is rounded to bfloat16; their sum over micro-steps and ranks is not."""
    loop = {"steps": 1, "global_batch_size": 2 * accumulation, "micro_batch": 1, "max_grad_norm": 0.0}
    run = start(tmp_path / "two", 2, loop, bf16=True)
    (tmp_path / "one").mkdir()
    train(tmp_path / "one", LoopSettings(**loop), Options(bf16=True), world)
    assert run.wait() == [0, 0], run.stderr
    one_rank, two_ranks = gradient(tmp_path / "one"), gradient(tmp_path / "two")
    assert (one_rank - two_ranks).norm() < 1e-6 * one_rank.norm()


def test_bfloat16_gradients_are_summed_in_float32(world: DistributedContext, tmp_path: Path) -> None:
    """64 gradients that are powers of two: summed in bfloat16, the small ones would vanish."""
    engine = Engine(
        GradientIsInput().bfloat16(), world, LoopSettings(global_batch_size=64, micro_batch=1, max_grad_norm=0.0)
    )
    scales = [256.0] + 63 * [0.5]
    for number, scale in enumerate(scales):
        engine.backward(engine.forward(torch.tensor(scale)), last=number == len(scales) - 1)
    assert engine.step(0.0) == pytest.approx(sum(scales), rel=1e-6)
    engine.close()


class GradientIsInput(nn.Module):
    """Its gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return (self.weight.float() * scale).sum()


def test_a_nonfinite_loss_names_the_sample_and_keeps_the_checkpoint(tmp_path: Path, start: Start) -> None:
    run = start(tmp_path, 2, {**LOOP, "micro_batch": 2}, poison=8 * 6 + 3)
    assert run.wait() == [1, 1]
    for text in run.stderr:
        assert "the loss of toy-51 on rank 1 is not finite" in text
        assert "Traceback" not in text
    assert (tmp_path / "checkpoints/step-000004/COMPLETE").exists()
    assert [row["step"] for row in curve(tmp_path) if "loss" in row][-1] == 6
    assert start(tmp_path, 1, LOOP).wait() == [0], "the run does not resume with repaired data"


def test_a_parameter_without_gradient_is_refused_before_the_first_step(tmp_path: Path, start: Start) -> None:
    run = start(tmp_path, 1, LOOP, idle=True)
    assert run.wait() == [1]
    assert "2 of 6 trainable parameters got no gradient (first: idle.bias)" in run.stderr[0]


def test_an_indivisible_global_batch_is_refused(tmp_path: Path, start: Start) -> None:
    run = start(tmp_path, 2, {**LOOP, "global_batch_size": 7})
    assert run.wait() == [2, 2]
    assert "--loop.global-batch-size 7 cannot be shared by 2 processes" in run.stderr[0]


def test_a_full_disk_keeps_the_last_complete_checkpoint(tmp_path: Path, start: Start) -> None:
    assert start(tmp_path, 1, LOOP, signal="SIGTERM", at=2).wait() == [75]
    run = start(tmp_path, 2, LOOP, no_room=6000)
    assert run.wait() == [1, 1]
    assert "could not write" in run.stderr[0]
    assert "the last complete checkpoint is step-000002" in run.stderr[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert start(tmp_path, 1, LOOP).wait() == [0]


def test_a_finished_run_is_not_repeated(tmp_path: Path, start: Start) -> None:
    assert start(tmp_path, 1, LOOP).wait() == [0]
    before = json.loads((tmp_path / "end.json").read_text())
    rows = curve(tmp_path)
    assert start(tmp_path, 1, LOOP).wait() == [0]
    assert json.loads((tmp_path / "end.json").read_text()) == before
    assert curve(tmp_path) == rows


def test_train_step_and_evaluate_report_their_phase(world: DistributedContext) -> None:
    """Phases are ordered: a rank that hangs in a forward pass is behind those that wait for its gradients."""
    data, phases = ToyData(8, 1), []
    engine = Engine(ToyTask(), world, LoopSettings(global_batch_size=2, micro_batch=1))
    train_step(engine, [data.collate([data[n]]) for n in (1, 2)], 0.01, world, enter_phase=phases.append)
    engine.close()
    passes = [f"{direction} {number}" for number in (1, 2) for direction in ("forward", "backward")]
    assert phases == ["the token count", *passes, "the update"]
    evaluate(engine.task, data, world, batch_size=1, device=engine.device, enter_phase=phases.append)
    assert phases[6:] == ["window 1", "the end"]
