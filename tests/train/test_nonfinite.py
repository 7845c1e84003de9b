"""Losses and gradients that are not finite: the samples and ranks that are named."""

from __future__ import annotations

import pytest
import torch

from lavic.distributed.context import DistributedContext
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.nonfinite import NonFiniteError, find_nonfinite_samples
from lavic.train.train_step import train_step
from tests.train.stage_tasks import TwoRanks
from tests.train.toy import ToyBatch, ToyData, ToyTask


class SteepTask(ToyTask):
    """Finite losses; the gradient is not finite where an input is 7."""

    def forward(self, batch: ToyBatch) -> torch.Tensor:
        steep = torch.sqrt((7.0 - batch.inputs[:, 0]).abs() * self.second.bias[0].exp())
        return super().forward(batch) + steep * 0.0


def test_a_nonfinite_gradient_names_the_micro_batch_and_keeps_the_weights(world: DistributedContext) -> None:
    data, task = ToyData(16, 1), SteepTask()
    engine = Engine(task, world, LoopSettings(global_batch_size=4, micro_batch=2))
    micros = [data.collate([data[n] for n in pair]) for pair in ((1, 2), (3, 4))]
    train_step(engine, micros, 0.01, world)
    micros[1].inputs[0, 0] = 7.0
    before = [p.clone() for p in task.parameters()]
    with pytest.raises(
        NonFiniteError, match="the gradient of toy-3, toy-4 on rank 0 is not finite: check these samples"
    ):
        train_step(engine, micros, 0.01, world)
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
    engine.close()


def test_nonfinite_samples_are_named_with_their_rank() -> None:
    data, task = ToyData(16, 1), ToyTask()
    micro = data.collate([data[2], data[3]])
    losses = task(micro).detach()
    losses[-1] = float("inf")
    both = TwoRanks(other=lambda keys: ["toy-9"])
    assert find_nonfinite_samples(task, [micro], [losses], both) == "toy-3 on rank 0; toy-9 on rank 1"
