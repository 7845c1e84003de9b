"""DeepSpeed's configuration, and the engine in this very process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lavic.distributed.context import DistributedContext
from lavic.errors import ConfigError
from lavic.train.config import LoopSettings
from lavic.train.deepspeed.config import Zero2Footprint
from lavic.train.deepspeed.engine import Engine
from tests.fork_server import ForkServer
from tests.train.toy import ToyData, ToyTask

pytestmark = pytest.mark.slow


def test_a_task_without_trainable_parameters_is_refused(world: DistributedContext) -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        Engine(ToyTask().requires_grad_(False), world, LoopSettings())


START = """
import sys
from lavic.train.deepspeed.engine import Engine
from lavic.train.config import LoopSettings
from lavic.distributed.context import DistributedContext
from tests.train.toy import ToyTask
world = DistributedContext()
world.init_process_group()
Engine(ToyTask(), world, LoopSettings())
slow = ("mlflow.", "torch._inductor.compile_fx", "torch.utils.cpp_extension")
print([name for name in sys.modules if name.startswith(slow)])
"""


TWO_GROUPS = """
from lavic.train.deepspeed.engine import Engine
from lavic.train.config import LoopSettings
from lavic.distributed.context import DistributedContext
from tests.train.toy import ToyTask
world = DistributedContext()
for _ in range(2):
    with world.process_group():
        Engine(ToyTask(), world, LoopSettings())
"""


CALLERS_GROUP = """
import torch.distributed as dist
from lavic.train.deepspeed.engine import Engine
from lavic.train.config import LoopSettings
from lavic.distributed.context import DistributedContext
from tests.train.toy import ToyTask
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
world = DistributedContext()
with world.process_group():
    Engine(ToyTask(), world, LoopSettings())
assert world.is_initialized
"""


@pytest.mark.parametrize("program", [TWO_GROUPS, CALLERS_GROUP], ids=["two groups", "caller's group"])
def test_engines_start_in_new_and_existing_process_groups(
    program: str, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    run = fork_server.run(["-c", program])
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"zero_optimization": {"reduce_buckets": 7}}, "reduce_buckets Extra inputs are not permitted"),
        ({"prescale_gradients": True}, "pre-scale gradients is not yet supported"),
        ({"sparse_gradients": True}, "has been removed"),
    ],
)
def test_settings_that_deepspeed_refuses_are_one_line(world: DistributedContext, extra: dict, reason: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^--deepspeed: DeepSpeed does not accept these settings: .*{reason}"
    ) as error:
        Engine(ToyTask(), world, LoopSettings(), extra=extra)
    assert "\n" not in str(error.value)


def test_engine_start_compiles_nothing_and_imports_no_mlflow(tmp_path: Path) -> None:
    """With an empty extension cache and no compiler on PATH."""
    env = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path), "LAVIC_DEVICE": "cpu", "PYTHONPATH": "."}
    run = subprocess.run([sys.executable, "-c", START], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().splitlines()[-1] == "[]"


def test_bfloat16_weights_have_float32_masters(world: DistributedContext) -> None:
    """Updates too small for a bfloat16 weight add up in its master, which the checkpoint holds."""
    engine, data = Engine(ToyTask().bfloat16(), world, LoopSettings(max_grad_norm=0.0)), ToyData(40, 1)
    batch = data.collate([data[p] for p in range(8)])
    batch = replace(batch, inputs=batch.inputs.bfloat16())
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    for _ in range(3):
        engine.backward(engine.forward(batch).float().mean())
        engine.step(1e-6)
    trained = sum(p.numel() for p in engine.parameters.values())
    state = engine.state_dict()
    assert (
        sum(tensor.nbytes for tensor in state.values())
        == Zero2Footprint.of(frozen=0, trained=trained, ranks=1).checkpoint
    )
    name = "second.weight"
    assert engine.parameters[name].dtype == torch.bfloat16
    assert state[f"{name}/weight"].dtype == torch.float32
    assert (state[f"{name}/weight"] - before[name].float()).abs().max() == pytest.approx(3e-6, rel=0.1)
    torch.testing.assert_close(state[f"{name}/weight"].bfloat16(), engine.parameters[name].detach(), rtol=0, atol=0)

    other = Engine(ToyTask().bfloat16(), world, LoopSettings(max_grad_norm=0.0))
    other.load_state_dict(state, steps=3)
    assert all((other.state_dict()[key] == value).all() for key, value in state.items())


def test_state_dict_round_trip_into_another_engine(world: DistributedContext) -> None:
    def steps(engine: Engine, first: int, last: int) -> list[float]:
        data, losses = ToyData(40, 1), []
        for step in range(first, last):
            loss = engine.forward(data.collate([data[p] for p in range(8 * step, 8 * step + 8)])).mean()
            engine.backward(loss)
            engine.step(0.05)
            losses.append(loss.item())
        return losses

    loop = LoopSettings(max_grad_norm=0.0)
    source = Engine(ToyTask(), world, loop)
    steps(source, 0, 3)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    assert set(state) == {
        f"{name}/{part}" for name in source.parameters for part in ("weight", "exp_avg", "exp_avg_sq")
    }
    assert all(torch.count_nonzero(tensor) for tensor in state.values())

    task = ToyTask()
    torch.nn.init.zeros_(task.first.weight)
    restored = Engine(task, world, loop)
    restored.load_state_dict(state, steps=3)
    for name, tensor in restored.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    assert steps(restored, 3, 6) == steps(source, 3, 6)

    del state["first.bias/exp_avg"]
    with pytest.raises(ConfigError, match="another model"):
        restored.load_state_dict(state, steps=3)
