"""The check of a saved bundle: it is the trained model, and checking it does not change the training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lavic.distributed.context import DistributedContext
from lavic.errors import LavicError
from lavic.model import lora
from lavic.model.bundle import save_bundle
from lavic.model.inputs.token_loss import unwrap_peft
from lavic.model.lora import WEIGHTS, copy_adapter
from lavic.train.bundle_check import check_bundle
from lavic.train.deepspeed.engine import Engine
from lavic.train.train_step import train_step
from tests.train.assets import Assets
from tests.train.stage_tasks import LOOP, stage_1, stage_2, trained

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", [stage_1, stage_2, partial(stage_2, dtype="bfloat16")])
def test_checking_a_bundle_does_not_change_the_training(
    assets: Assets, tmp_path: Path, world: DistributedContext, stage: Callable
) -> None:
    results = []
    for check in (False, True):
        backbone, model, task, data = stage(assets)
        kind, vision = task.trains, None if stage is stage_1 else assets.vision
        engine = Engine(task, world, LOOP)
        norms = []
        for step in range(4):
            batch = data.collate([data[n] for n in range(4 * step, 4 * step + 4)])
            norms.append(train_step(engine, [batch], 0.01, world, seed=(1, step)).grad_norm)
            if check:
                sides = {"vision": model} if kind == "vision" else {"vision": vision, "language": model}
                save_bundle(tmp_path / "bundle", backbone, **sides)
                check_bundle(tmp_path / "bundle", model, task, data, world, vision=vision)
        results.append((norms, {name: p.clone() for name, p in trained(task).items()}))
        assert task.training
        engine.close()
    (norms, weights), (norms_checked, weights_checked) = results
    assert norms == norms_checked
    assert weights.keys() == weights_checked.keys()
    assert all(torch.equal(weights[name], weights_checked[name]) for name in weights)


def change_weight(bundle: Path, _: Assets) -> None:
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


def add_foreign_weight(bundle: Path, _: Assets) -> None:
    state = load_file(bundle / "language_adapter" / WEIGHTS)
    file = bundle / "vision_adapter" / WEIGHTS
    save_file({**load_file(file), **dict([next(iter(state.items()))])}, file)


def change_vision(bundle: Path, _: Assets) -> None:
    file = bundle / "vision_adapter" / WEIGHTS
    save_file({name: weight + 0.1 for name, weight in load_file(file).items()}, file)


def remove_vision(bundle: Path, _: Assets) -> None:
    (bundle / "vision_adapter" / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_weight, "differs from the trained weight"),
        (drop_key, "1 weights are saved or trained, but not both"),
        (change_scale, r"its loss on \d+ validation samples is \S+, that of the trained model"),
        (add_foreign_weight, r"its vision adapter has the foreign weight \S+language_model"),
        (change_vision, "its vision adapter differs from that of stage 1"),
        (remove_vision, "its vision adapter differs from that of stage 1"),
    ],
)
def test_a_bundle_that_differs_from_the_trained_model_is_refused(
    assets: Assets, tmp_path: Path, world: DistributedContext, damage: Callable, message: str
) -> None:
    backbone, model, task, data = stage_2(assets)
    for name, parameter in trained(task).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    copy_adapter(assets.vision, tmp_path / "vision")
    save_bundle(tmp_path / "bundle", backbone, vision=tmp_path / "vision", language=model)
    damage(tmp_path / "bundle", assets)
    before = trained(task).keys()
    with pytest.raises(LavicError, match=message):
        check_bundle(tmp_path / "bundle", model, task, data, world, vision=tmp_path / "vision")
    assert trained(task).keys() == before, "the trained parameters stay trainable"


def test_a_bundle_is_compared_on_evenly_spaced_samples(
    assets: Assets, tmp_path: Path, world: DistributedContext
) -> None:
    backbone, model, task, data = stage_2(assets)
    for name, parameter in trained(task).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    save_bundle(tmp_path / "bundle", backbone, vision=assets.vision, language=model)
    positions = []

    class LargeSet:
        """640 samples; of those compared, every fourth has no target."""

        def __len__(self) -> int:
            return 640

        def __getitem__(self, position: int) -> Any:
            positions.append(position)
            return data[position]

        def collate(self, samples: list) -> Any:
            batch = data.collate(samples)
            return replace(batch, targets=(0,)) if positions[-1] % 40 == 0 else batch

    check_bundle(tmp_path / "bundle", model, task, LargeSet(), world, vision=assets.vision)
    assert positions[:64] == list(range(0, 640, 10)), "evenly spaced"
    assert positions[64:] == [n for n in range(1, 18) if n % 10], "16 other samples replace those without a target"


@pytest.mark.parametrize("stage", [stage_1, stage_2])
def test_an_adapter_rounded_away_by_a_bfloat16_merge_is_refused(
    assets: Assets, tmp_path: Path, world: DistributedContext, stage: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight is finite and every key exists, but merging into bfloat16 changed the model."""
    backbone, model, task, data = stage(assets, "bfloat16")
    kind, vision = task.trains, None if stage is stage_1 else assets.vision
    unwrap_peft(model).lm_head.weight.data *= 100  # so that small changes of random weights change the loss
    for name, parameter in trained(task).items():
        parameter.data = parameter.data.bfloat16()  # as DeepSpeed has it
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.003)
    sides = {"vision": model} if kind == "vision" else {"vision": vision, "language": model}
    save_bundle(tmp_path / "bundle", backbone, **sides)
    check_bundle(tmp_path / "bundle", model, task, data, world, vision=vision)

    def merged(linear: nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float, *, merge: bool) -> nn.Linear:
        merged_linear = copy.deepcopy(linear)
        merged_linear.weight.data += (b @ a * scale).to(merged_linear.weight)
        return merged_linear

    monkeypatch.setattr(lora, "adapted", merged)
    with pytest.raises(LavicError, match="it is not the same model"):
        check_bundle(tmp_path / "bundle", model, task, data, world, vision=vision)
