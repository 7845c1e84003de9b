"""The GPU of a rank: one that it sees, under torchrun, srun and --gpus-per-task."""

from __future__ import annotations

import os

import pytest
import torch

from lavic.distributed.context import DistributedContext
from lavic.errors import LaunchError

SRUN_STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}


def srun_task(number: int, **extra: str) -> dict[str, str]:
    """Environment of one of eight srun tasks on two nodes."""
    ids = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number % 4), "SLURM_NODEID": str(number // 4)}
    return {**SRUN_STEP, **ids, **extra}


def srun_task_with_torchrun_names(number: int) -> dict[str, str]:
    """The same in a wrapper script that exports torchrun's variables."""
    exported = {"RANK": str(number), "LOCAL_RANK": str(number % 4), "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    return srun_task(number, **exported)


@pytest.mark.parametrize(
    ("env", "visible", "index"),
    [
        (srun_task(6), 4, 2),  # all GPUs of the node
        (srun_task(6), 1, 0),  # --gpus-per-task=1
        (srun_task_with_torchrun_names(6), 1, 0),
        (srun_task(1, SLURM_GPUS_PER_TASK="2"), 2, 1),
        (srun_task(7, SLURM_GPUS_PER_TASK="2"), 2, 1),
        (srun_task(6, SLURM_TRES_PER_TASK="cpu:8,gres/gpu:2"), 2, 0),
        ({"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 8, 3),
        ({}, 1, 0),
    ],
)
def test_gpu_index_is_one_that_the_rank_sees(env, visible, index):
    assert DistributedContext.from_env(env).gpu_index(visible, env) == index


@pytest.mark.parametrize(
    ("env", "visible"),
    [
        (srun_task(7), 2),  # four tasks share the node's two GPUs
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 1),
        # torchrun below srun: a task per node
        (
            {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
            | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_PROCID": "0"},
            1,
        ),
        (srun_task(0), 0),
    ],
)
def test_more_ranks_than_gpus_are_refused(env, visible):
    with pytest.raises(
        LaunchError, match=f"but {visible} are visible on this node; start at most {visible} processes per node"
    ):
        DistributedContext.from_env(env).gpu_index(visible, env)


@pytest.mark.parametrize("env", [srun_task(6), srun_task_with_torchrun_names(6)])
def test_deepspeed_gets_the_gpu_index_as_local_rank(env, no_group, monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    for name, value in {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LAVIC_DEVICE", raising=False)
    before, world = dict(os.environ), DistributedContext.from_env()
    world.init_process_group()
    received = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    world.destroy_process_group()
    assert received == {"RANK": "6", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert devices == [torch.device("cuda", 0)]
    assert dict(os.environ) == before
