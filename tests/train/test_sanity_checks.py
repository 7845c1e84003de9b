"""What a run checks of itself: each fault is made here, and found."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lavic.data.conversations import read_conversations
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.context import DistributedContext
from lavic.errors import LavicError
from lavic.model import lora
from lavic.model.bundle import save_bundle
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.inputs.token_loss import unwrap_peft
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.lora import WEIGHTS, add_adapter, apply_adapter, copy_adapter
from lavic.train.bundle_check import check_bundle
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.engine import Engine
from lavic.train.distillation.dataset import DistillDataset
from lavic.train.distillation.task import DistillTask
from lavic.train.nonfinite import NonFiniteError, find_nonfinite_samples
from lavic.train.recommendation.dataset import TuneDataset
from lavic.train.recommendation.task import TuneTask
from lavic.train.sanity_checks import SanityChecks, parameter_checksums
from lavic.train.train_step import train_step
from tests.train.assets import KEY, Assets
from tests.train.conftest import Start
from tests.train.toy import ToyBatch, ToyData, ToyTask

LORA = LoraSettings(r=2, dropout=0.1)
LOOP = LoopSettings(global_batch_size=4, lr=0.01)


def trained(task: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in task.named_parameters() if p.requires_grad}


def stage_1(assets: Assets, dtype: str = "float32") -> tuple[Backbone, Any, DistillTask, DistillDataset]:
    backbone = Backbone.load(ModelSettings(name=str(assets.base), dtype=dtype))
    torch.manual_seed(3)
    model = add_adapter(backbone, "vision", LORA)
    data = DistillDataset(ShardDataset(assets.photos), backbone.geometry, backbone.encoder, max_length=64)
    return backbone, model, DistillTask(model), data


def stage_2(assets: Assets, dtype: str = "float32") -> tuple[Backbone, Any, TuneTask, TuneDataset]:
    backbone = Backbone.load(ModelSettings(name=str(assets.base), dtype=dtype), vision=False)
    apply_adapter(backbone, assets.vision, "vision")
    torch.manual_seed(3)
    model = add_adapter(backbone, "language", LORA)
    rows, store = read_conversations(assets.rows), ItemStore.open(assets.store)
    return backbone, model, TuneTask(model), TuneDataset(rows, store, backbone.encoder, candidates=KEY, max_length=400)


# --- before the first step ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "freed", "message"),
    [
        (stage_1, "language_model.layers.0.self_attn.q_proj", "this stage trains LoRA on vision_tower and"),
        (stage_1, "vision_tower.encoder.layers.0.mlp.fc1", "vision_tower and multi_modal_projector alone"),
        (stage_2, "multi_modal_projector.linear_1", "this stage trains LoRA on language_model alone"),
        (stage_2, "lm_head", "lm_head.weight is trainable"),
    ],
)
def test_a_weight_of_the_frozen_side_is_refused_before_step_1(
    assets: Assets, world: DistributedContext, stage: Callable, freed: str, message: str
) -> None:
    task = stage(assets)[2]
    found = [p for name, p in task.named_parameters() if freed in name and "lora_" not in name]
    assert found
    for parameter in found:
        parameter.requires_grad_(True)
    with pytest.raises(LavicError, match=message):
        Engine(task, world, LOOP)


def test_each_part_of_the_side_is_trained(assets: Assets, world: DistributedContext) -> None:
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


@dataclass(frozen=True)
class TwoRanks(DistributedContext):
    """Rank 0 of two; the other one says what this one says, or what `other` makes of it."""

    size: int = 2
    other: Callable[[Any], Any] = lambda value: value

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, self.other(value)]


@pytest.mark.dist
def test_ranks_with_other_frozen_weights_are_refused_before_they_get_those_of_rank_0(
    tmp_path: Path, start: Start
) -> None:
    run = start(tmp_path, ranks=2, loop={"steps": 1, "global_batch_size": 4}, odd=True)
    assert set(run.wait()) == {1}
    assert all("rank 1 has other frozen weights than rank 0" in text for text in run.stderr)


def test_what_one_rank_finds_ends_all_of_them() -> None:
    task = ToyTask()
    odd = TwoRanks(other=lambda value: {"first.weight"} if isinstance(value, set) else value)
    guards = SanityChecks(task, trained(task), odd)
    guards.check_start([{"params": list(trained(task).values())}])
    task(ToyData(8, 1).collate([ToyData(8, 1)[3]])).sum().backward()
    with pytest.raises(LavicError, match=r"1 of 4 trainable parameters got no gradient \(first: first.weight\)"):
        guards.before_update()


# --- at a save ------------------------------------------------------------------------------------------


class Lazy(ToyTask):
    """Leaves its first layer out after a while."""

    lazy = False

    def forward(self, batch: ToyBatch) -> torch.Tensor:
        if self.lazy:
            return nn.functional.cross_entropy(self.second(batch.inputs.repeat(1, 2)[:, :24]), batch.labels)[None]
        return super().forward(batch)


def test_a_parameter_that_stops_getting_gradients_is_found_at_the_next_save(world: DistributedContext) -> None:
    data, task = ToyData(16, 1), Lazy()
    engine = Engine(task, world, LOOP)
    for step in range(3):
        train_step(engine, [data.collate([data[n] for n in range(4 * step, 4 * step + 4)])], 0.01, world)
    engine.state_dict()
    task.lazy = True
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
    engine.state_dict()  # a second save of the same step finds nothing new
    train_step(engine, [data.collate([data[4]])], 0.01, world)
    with torch.no_grad():
        task.base.weight[0, 0] = torch.nextafter(task.base.weight[0, 0], torch.tensor(9.0))
    with pytest.raises(LavicError, match="weights that should be frozen have changed"):
        engine.state_dict()
    engine.close()


def test_checksums_see_every_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        layer = nn.Linear(3, 2).to(dtype).requires_grad_(False)
        before = parameter_checksums(layer)
        layer.weight[1, 2] += 0.01
        assert [a == b for a, b in zip(before, parameter_checksums(layer), strict=True)] == [False, True]


def test_an_adapter_that_learnt_nothing_is_not_saved(assets: Assets, world: DistributedContext) -> None:
    _, _, task, data = stage_2(assets)
    engine = Engine(task, world, LOOP)
    train_step(engine, [data.collate([data[0]])], 0.0, world)
    with pytest.raises(LavicError, match="nothing was trained in 1 steps: every LoRA B is still zero"):
        engine.state_dict()
    train_step(engine, [data.collate([data[0]])], 0.01, world)
    engine.state_dict()
    engine.close()


# --- the saved bundle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [stage_1, stage_2, partial(stage_2, dtype="bfloat16")])
def test_looking_at_a_bundle_changes_nothing(
    assets: Assets, tmp_path: Path, world: DistributedContext, stage: Callable
) -> None:
    ends = []
    for look in (False, True):
        backbone, model, task, data = stage(assets)
        kind, vision = task.trains, None if stage is stage_1 else assets.vision
        engine = Engine(task, world, LOOP)
        norms = []
        for step in range(4):
            batch = data.collate([data[n] for n in range(4 * step, 4 * step + 4)])
            norms.append(train_step(engine, [batch], 0.01, world, seed=(1, step)).grad_norm)
            if look:
                sides = {"vision": model} if kind == "vision" else {"vision": vision, "language": model}
                save_bundle(tmp_path / "bundle", backbone, **sides)
                check_bundle(tmp_path / "bundle", model, task, data, world, vision=vision)
        ends.append((norms, {name: p.clone() for name, p in trained(task).items()}))
        assert task.training
        engine.close()
    (norms, weights), (others, same) = ends
    assert norms == others
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def spoil_weight(bundle: Path, _: Assets) -> None:
    file = bundle / "language_adapter" / WEIGHTS
    state = load_file(file)
    next(iter(state.values()))[0, 0] += 1e-3
    save_file(state, file)


def drop_key(bundle: Path, _: Assets) -> None:
    file = bundle / "language_adapter" / WEIGHTS
    state = load_file(file)
    del state[next(iter(state))]
    save_file(state, file)


def change_scale(bundle: Path, _: Assets) -> None:
    file = bundle / "language_adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 5}))


def mix_sides(bundle: Path, _: Assets) -> None:
    state = load_file(bundle / "language_adapter" / WEIGHTS)
    file = bundle / "vision_adapter" / WEIGHTS
    save_file({**load_file(file), **dict([next(iter(state.items()))])}, file)


def other_vision(bundle: Path, _: Assets) -> None:
    file = bundle / "vision_adapter" / WEIGHTS
    save_file({name: weight + 0.1 for name, weight in load_file(file).items()}, file)


def no_vision(bundle: Path, _: Assets) -> None:
    (bundle / "vision_adapter" / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weight, "differs from the trained weight"),
        (drop_key, "1 weights are saved or trained, but not both"),
        (change_scale, r"its loss on \d+ validation samples is \S+, that of the trained model"),
        (mix_sides, r"its vision adapter has the foreign weight \S+language_model"),
        (other_vision, "its vision adapter differs from that of stage 1"),
        (no_vision, "its vision adapter differs from that of stage 1"),
    ],
)
def test_a_bundle_that_is_not_what_was_trained_is_found(
    assets: Assets, tmp_path: Path, world: DistributedContext, spoil: Callable, message: str
) -> None:
    backbone, model, task, data = stage_2(assets)
    for name, parameter in trained(task).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    copy_adapter(assets.vision, tmp_path / "vision")
    save_bundle(tmp_path / "bundle", backbone, vision=tmp_path / "vision", language=model)
    spoil(tmp_path / "bundle", assets)
    before = trained(task).keys()
    with pytest.raises(LavicError, match=message):
        check_bundle(tmp_path / "bundle", model, task, data, world, vision=tmp_path / "vision")
    assert trained(task).keys() == before, "the trained adapter goes on"


def test_a_bundle_is_compared_on_samples_from_all_over_the_set(
    assets: Assets, tmp_path: Path, world: DistributedContext
) -> None:
    backbone, model, task, data = stage_2(assets)
    for name, parameter in trained(task).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    save_bundle(tmp_path / "bundle", backbone, vision=assets.vision, language=model)
    read = []

    class Many:
        """As a set of 640, of which the fourth part has no target."""

        def __len__(self) -> int:
            return 640

        def __getitem__(self, position: int) -> Any:
            read.append(position)
            return data[position]

        def collate(self, samples: list) -> Any:
            batch = data.collate(samples)
            return replace(batch, targets=(0,)) if read[-1] % 40 == 0 else batch

    check_bundle(tmp_path / "bundle", model, task, Many(), world, vision=assets.vision)
    assert read[:64] == list(range(0, 640, 10)), "evenly spaced"
    assert read[64:] == [n for n in range(1, 18) if n % 10], "and others in the place of the 16 without a target"


@pytest.mark.parametrize("stage", [stage_1, stage_2])
def test_a_bundle_whose_weights_lost_what_was_learnt_is_refused(
    assets: Assets, tmp_path: Path, world: DistributedContext, stage: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged into bfloat16 weights: every number is finite, every key is there, and it is another model."""
    backbone, model, task, data = stage(assets, "bfloat16")
    kind, vision = task.trains, None if stage is stage_1 else assets.vision
    unwrap_peft(model).lm_head.weight.data *= 100  # random weights say nothing: here each of their digits counts
    for name, parameter in trained(task).items():
        parameter.data = parameter.data.bfloat16()  # as DeepSpeed has it
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.003)
    sides = {"vision": model} if kind == "vision" else {"vision": vision, "language": model}
    save_bundle(tmp_path / "bundle", backbone, **sides)
    check_bundle(tmp_path / "bundle", model, task, data, world, vision=vision)

    def merged(linear: nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float, *, merge: bool) -> nn.Linear:
        whole = copy.deepcopy(linear)
        whole.weight.data += (b @ a * scale).to(whole.weight)
        return whole

    monkeypatch.setattr(lora, "adapted", merged)
    with pytest.raises(LavicError, match="it is not the same model"):
        check_bundle(tmp_path / "bundle", model, task, data, world, vision=vision)


# --- what is not a number -------------------------------------------------------------------------------


class Steep(ToyTask):
    """Its losses are finite; where an input is 7 the gradient is not."""

    def forward(self, batch: ToyBatch) -> torch.Tensor:
        steep = torch.sqrt((7.0 - batch.inputs[:, 0]).abs() * self.second.bias[0].exp())
        return super().forward(batch) + steep * 0.0


def test_a_gradient_that_is_not_finite_names_the_micro_batch_and_spares_the_weights(world: DistributedContext) -> None:
    data, task = ToyData(16, 1), Steep()
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


def test_blame_says_the_rank_of_each_sample() -> None:
    data, task = ToyData(16, 1), ToyTask()
    micro = data.collate([data[2], data[3]])
    losses = task(micro).detach()
    losses[-1] = float("inf")
    both = TwoRanks(other=lambda keys: ["toy-9"])
    assert find_nonfinite_samples(task, [micro], [losses], both) == "toy-3 on rank 0; toy-9 on rank 1"
