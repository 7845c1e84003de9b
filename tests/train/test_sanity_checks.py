"""Sanity checks of a run: trainable and frozen weights before step 1, gradients and frozen weights at a save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lavic.distributed.context import DistributedContext
from lavic.errors import LavicError
from lavic.train.deepspeed.engine import Engine
from lavic.train.sanity_checks import SanityChecks, parameter_checksums
from lavic.train.train_step import train_step
from tests.train.assets import Assets
from tests.train.conftest import Start
from tests.train.stage_tasks import LOOP, TwoRanks, stage_1, stage_2, trained
from tests.train.toy import ToyBatch, ToyData, ToyTask


@pytest.mark.parametrize(
    ("stage", "name_part", "message"),
    [
        (stage_1, "language_model.layers.0.self_attn.q_proj", "this stage trains LoRA on vision_tower and"),
        (stage_1, "vision_tower.encoder.layers.0.mlp.fc1", "vision_tower and multi_modal_projector alone"),
        (stage_2, "multi_modal_projector.linear_1", "this stage trains LoRA on language_model alone"),
        (stage_2, "lm_head", "lm_head.weight is trainable"),
    ],
)
def test_a_trainable_weight_of_the_frozen_side_is_refused_before_step_1(
    assets: Assets, world: DistributedContext, stage: Callable, name_part: str, message: str
) -> None:
    task = stage(assets)[2]
    parameters = [p for name, p in task.named_parameters() if name_part in name and "lora_" not in name]
    assert parameters
    for parameter in parameters:
        parameter.requires_grad_(True)
    with pytest.raises(LavicError, match=message):
        Engine(task, world, LOOP)


def test_a_side_with_an_untrained_part_is_refused(assets: Assets, world: DistributedContext) -> None:
    task = stage_1(assets)[2]
    for name, parameter in task.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(False)
    with pytest.raises(LavicError, match="nothing of multi_modal_projector is trainable"):
        Engine(task, world, LOOP)


def test_an_empty_parameter_group_is_refused() -> None:
    task = ToyTask()
    guards = SanityChecks(task, trained(task), DistributedContext())
    for groups in ([], [{"params": []}], [{"params": list(task.parameters())}, {"params": []}]):
        with pytest.raises(LavicError, match="an empty parameter group"):
            guards.check_start(groups)


@pytest.mark.dist
def test_ranks_with_different_frozen_weights_are_refused(tmp_path: Path, start: Start) -> None:
    run = start(tmp_path, ranks=2, loop={"steps": 1, "global_batch_size": 4}, odd=True)
    assert set(run.wait()) == {1}
    assert all("rank 1 has other frozen weights than rank 0" in text for text in run.stderr)


def test_a_failed_check_on_one_rank_ends_all_ranks() -> None:
    task = ToyTask()
    other_rank = TwoRanks(other=lambda value: {"first.weight"} if isinstance(value, set) else value)
    guards = SanityChecks(task, trained(task), other_rank)
    guards.check_start([{"params": list(trained(task).values())}])
    task(ToyData(8, 1).collate([ToyData(8, 1)[3]])).sum().backward()
    with pytest.raises(LavicError, match=r"1 of 4 trainable parameters got no gradient \(first: first.weight\)"):
        guards.before_update()


class SkipsFirstLayer(ToyTask):
    """Leaves out its first layer once `skip` is set."""

    skip = False

    def forward(self, batch: ToyBatch) -> torch.Tensor:
        if self.skip:
            return nn.functional.cross_entropy(self.second(batch.inputs.repeat(1, 2)[:, :24]), batch.labels)[None]
        return super().forward(batch)


def test_a_parameter_without_gradients_is_found_at_the_next_save(world: DistributedContext) -> None:
    data, task = ToyData(16, 1), SkipsFirstLayer()
    engine = Engine(task, world, LOOP)
    for step in range(3):
        train_step(engine, [data.collate([data[n] for n in range(4 * step, 4 * step + 4)])], 0.01, world)
    engine.state_dict()
    task.skip = True
    engine.backward(engine.forward(data.collate([data[3]])).sum())
    engine.step(0.01)
    with pytest.raises(LavicError, match=r"2 of 4 trainable parameters got no gradient \(first: first.bias\)"):
        engine.state_dict()
    engine.close()


def test_a_frozen_weight_that_changed_is_found_at_the_next_save(world: DistributedContext) -> None:
    data, task = ToyData(16, 1), ToyTask()
    engine = Engine(task, world, LOOP)
    train_step(engine, [data.collate([data[3]])], 0.01, world)
    engine.state_dict()
    engine.state_dict()  # a second save of the same step passes
    train_step(engine, [data.collate([data[4]])], 0.01, world)
    with torch.no_grad():
        task.base.weight[0, 0] = torch.nextafter(task.base.weight[0, 0], torch.tensor(9.0))
    with pytest.raises(LavicError, match="weights that should be frozen have changed"):
        engine.state_dict()
    engine.close()


def test_checksums_detect_changes_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        layer = nn.Linear(3, 2).to(dtype).requires_grad_(False)
        before = parameter_checksums(layer)
        layer.weight[1, 2] += 0.01
        assert [a == b for a, b in zip(before, parameter_checksums(layer), strict=True)] == [False, True]


def test_an_untrained_adapter_is_not_saved(assets: Assets, world: DistributedContext) -> None:
    _, _, task, data = stage_2(assets)
    engine = Engine(task, world, LOOP)
    train_step(engine, [data.collate([data[0]])], 0.0, world)
    with pytest.raises(LavicError, match="nothing was trained in 1 steps: every LoRA B is still zero"):
        engine.state_dict()
    train_step(engine, [data.collate([data[0]])], 0.01, world)
    engine.state_dict()
    engine.close()
