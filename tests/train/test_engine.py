"""DeepSpeed's configuration, and the engine in this very process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lavic.errors import ConfigError
from lavic.train.engine import Engine, read_json, zero2_config
from lavic.train.settings import LoopSettings
from lavic.world import World
from tests.train.toy import ToyData, ToyTask


def test_the_configuration_is_zero_2_without_surprises() -> None:
    config = zero2_config(micro_batch=4, accumulation=2, clip=1.0, bf16=True)
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["bf16"] == {"enabled": True}
    assert "bf16" not in zero2_config(micro_batch=4, accumulation=2, clip=1.0, bf16=False)


def test_a_users_json_adds_but_does_not_contradict() -> None:
    extra = {"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    config = zero2_config(micro_batch=1, accumulation=1, clip=0.0, bf16=False, extra=extra)
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 2
    assert config["wall_clock_breakdown"] is True
    with pytest.raises(ConfigError, match=r"sets gradient_clipping: remove it, loop.clip says it"):
        zero2_config(micro_batch=1, accumulation=1, clip=1.0, bf16=False, extra={"gradient_clipping": 2})
    with pytest.raises(ConfigError, match="stage 3"):
        zero2_config(micro_batch=1, accumulation=1, clip=1.0, bf16=False, extra={"zero_optimization": {"stage": 3}})


def test_a_users_json_that_is_none(tmp_path: Path) -> None:
    assert read_json(None) == {}
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "good.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "good.json") == {"a": 1}
    with pytest.raises(ConfigError, match="not a JSON object"):
        read_json(tmp_path / "list.json")
    with pytest.raises(ConfigError, match=r"missing.json"):
        read_json(tmp_path / "missing.json")


def test_nothing_to_train_is_an_error(world: World) -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        Engine(ToyTask().requires_grad_(False), world, LoopSettings())


START = """
import sys
from lavic.train.engine import Engine
from lavic.train.settings import LoopSettings
from lavic.world import World
from tests.train.toy import ToyTask
world = World()
world.start()
Engine(ToyTask(), world, LoopSettings())
slow = ("mlflow.", "torch._inductor.compile_fx", "torch.utils.cpp_extension")
print([name for name in sys.modules if name.startswith(slow)])
"""


def test_a_start_compiles_nothing_and_imports_no_tracker(tmp_path: Path) -> None:
    """With an empty cache and no compiler in sight."""
    env = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path), "LAVIC_DEVICE": "cpu", "PYTHONPATH": "."}
    run = subprocess.run([sys.executable, "-c", START], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().splitlines()[-1] == "[]"


def test_bfloat16_keeps_float32_masters(world: World) -> None:
    """Steps too small for a bfloat16 weight add up in its master, and a checkpoint holds the master."""
    engine, data = Engine(ToyTask().bfloat16(), world, LoopSettings(clip=0.0)), ToyData(40, 1)
    batch = data.collate([data[p] for p in range(8)])
    batch = replace(batch, inputs=batch.inputs.bfloat16())
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    for _ in range(3):
        engine.backward(engine.forward(batch).float().mean())
        engine.step(1e-6)
    state = engine.state()
    name = "second.weight"
    assert engine.parameters[name].dtype == torch.bfloat16
    assert state[f"{name}/weight"].dtype == torch.float32
    assert (state[f"{name}/weight"] - before[name].float()).abs().max() == pytest.approx(3e-6, rel=0.1)
    torch.testing.assert_close(state[f"{name}/weight"].bfloat16(), engine.parameters[name].detach(), rtol=0, atol=0)

    other = Engine(ToyTask().bfloat16(), world, LoopSettings(clip=0.0))
    other.load(state, steps=3)
    assert all((other.state()[key] == value).all() for key, value in state.items())


def test_state_goes_into_another_engine_and_back(world: World) -> None:
    def steps(engine: Engine, first: int, last: int) -> list[float]:
        data, losses = ToyData(40, 1), []
        for step in range(first, last):
            loss = engine.forward(data.collate([data[p] for p in range(8 * step, 8 * step + 8)])).mean()
            engine.backward(loss)
            engine.step(0.05)
            losses.append(loss.item())
        return losses

    loop = LoopSettings(clip=0.0)
    left = Engine(ToyTask(), world, loop)
    steps(left, 0, 3)
    state = {name: tensor.clone() for name, tensor in left.state().items()}
    assert set(state) == {f"{name}/{part}" for name in left.parameters for part in ("weight", "exp_avg", "exp_avg_sq")}
    assert all(torch.count_nonzero(tensor) for tensor in state.values())

    task = ToyTask()
    torch.nn.init.zeros_(task.first.weight)
    right = Engine(task, world, loop)
    right.load(state, steps=3)
    for name, tensor in right.state().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    assert steps(right, 3, 6) == steps(left, 3, 6)

    del state["first.bias/exp_avg"]
    with pytest.raises(ConfigError, match="another model"):
        right.load(state, steps=3)
