"""`DistributedContext`: ranks from the environment, collectives over gloo in real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest
import torch

from lavic.distributed.context import DistributedContext
from lavic.distributed.launcher_env import free_port
from lavic.distributed.wait import InterruptibleWait
from lavic.errors import ConfigError, LaunchError
from tests.fork_server import ForkServer

COLLECTIVES = """
import json, os, sys, time
import torch
from lavic.distributed.context import DistributedContext

world = DistributedContext.from_env()
world.init_process_group(timeout_s=60)
total = world.all_reduce(torch.tensor([1.0 + world.rank, 10.0]))
output = {
    "rank": world.rank,
    "sum": total.tolist(),
    "count": world.all_reduce(torch.tensor(2**40 + world.rank)).item(),
    "any": world.any_rank(world.rank == 1),
    "none": world.any_rank(False),
    "all": world.all_gather_object({"rank": world.rank, "word": "x" * (world.rank + 1)}),
    "received": world.broadcast_object(f"from {world.rank}"),
}
if world.is_main:
    time.sleep(0.5)
    open(sys.argv[1] + ".main", "w").close()
world.barrier()
output["main_was_first"] = os.path.exists(sys.argv[1] + ".main")
json.dump(output, open(f"{sys.argv[1]}.{world.rank}", "w"))
world.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, DistributedContext()),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"},
            DistributedContext(rank=3, size=4, local_rank=1, local_world_size=2, node_rank=1, launcher="torchrun"),
        ),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "7",
                "SLURM_LOCALID": "1",
                "SLURM_NODEID": "2",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
            },
            DistributedContext(rank=5, size=7, local_rank=1, local_world_size=2, node_rank=2, launcher="srun"),
        ),
        # The shell of a batch script: it has the job's variables but is no rank.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, DistributedContext()),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, DistributedContext()),
        # A shell that salloc opens: a step of one task in a job of eight.
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
                "SLURM_NODEID": "0",
                "SLURM_NTASKS": "8",
                "SLURM_STEP_ID": "4294967290",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_STEP_TASKS_PER_NODE": "1",
            },
            DistributedContext(),
        ),
        # srun of two tasks inside of a larger allocation.
        (
            {
                "SLURM_PROCID": "1",
                "SLURM_LOCALID": "1",
                "SLURM_NODEID": "0",
                "SLURM_NTASKS": "8",
                "SLURM_STEP_ID": "3",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_TASKS_PER_NODE": "2",
            },
            DistributedContext(rank=1, size=2, local_rank=1, local_world_size=2, launcher="srun"),
        ),
        # torchrun below srun: one task per node, torchrun's ranks count.
        (
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_STEP_ID": "1",
            },
            DistributedContext(rank=1, size=2, launcher="torchrun"),
        ),
    ],
)
def test_ranks_are_read_from_the_environment(env, world):
    assert DistributedContext.from_env(env) == world


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "two"},
    ],
)
def test_an_inconsistent_environment_is_refused(env):
    with pytest.raises(ConfigError, match="environment"):
        DistributedContext.from_env(env)


def test_nproc_is_ignored_where_a_launcher_has_started_one_rank(monkeypatch):
    """Of torchrun; a cluster that gives a container RANK=0 and WORLD_SIZE=1 has started no ranks."""
    launched = DistributedContext.from_env({"RANK": "0", "WORLD_SIZE": "1"})
    assert launched.must_start(8) and not launched.must_start(1)
    assert DistributedContext().must_start(2) and not DistributedContext(size=2).must_start(2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not launched.must_start(8)


def test_a_world_of_one_needs_no_process_group():
    world = DistributedContext()
    value = torch.tensor([1.0])
    total = world.all_reduce(value)
    total += 1
    assert value.item() == 1.0
    assert (world.any_rank(True), world.any_rank(False)) == (True, False)
    assert world.all_gather_object("x") == ["x"]
    assert world.broadcast_object("x") == "x"
    world.barrier()
    assert world.is_main


def test_collectives_before_init_process_group_are_refused(no_group):
    with pytest.raises(RuntimeError, match="call init_process_group"):
        DistributedContext(size=2).barrier()


def test_a_missing_master_address_names_torchrun_and_nproc(no_group, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(LaunchError, match="torchrun or --nproc"):
        DistributedContext(size=2).init_process_group()


def test_lavic_device_cpu_forces_the_cpu(monkeypatch):
    monkeypatch.setenv("LAVIC_DEVICE", "cpu")
    assert DistributedContext(local_rank=99).device() == torch.device("cpu")


@pytest.mark.dist
def test_a_world_of_one_starts_twice_and_restores_the_environment(fork_server: ForkServer):
    run_in_new_process(
        fork_server,
        """
before = dict(os.environ)
for _ in range(2):
    world = DistributedContext()
    world.init_process_group()
    world.init_process_group()
    assert world.is_initialized
    assert os.environ["LOCAL_RANK"] == "0" and os.environ["MASTER_PORT"] == "0"
    world.destroy_process_group()
    assert not world.is_initialized
    assert dict(os.environ) == before
""",
    )


@pytest.mark.dist
@pytest.mark.parametrize("end", ["pass", "raise Stopped", "raise ValueError"])
def test_process_group_block_leaves_only_the_group_that_it_joined(end, fork_server: ForkServer):
    run_in_new_process(
        fork_server,
        f"""
world = DistributedContext()
for joined in (False, True):
    if joined:
        world.init_process_group()
    with suppress(Stopped, ValueError), world.process_group():
        assert world.is_initialized
        {end}
    assert world.is_initialized == joined
""",
    )


def run_in_new_process(fork_server: ForkServer, lines: str) -> None:
    """Runs lines in a new process: tests of this process share one process group."""
    imports = """
import os
from contextlib import suppress
from lavic.distributed.context import DistributedContext
from lavic.errors import LaunchError, Stopped
"""
    result = fork_server.run(["-c", imports + lines])
    assert result.returncode == 0, result.stderr


@pytest.mark.dist
def test_collectives_between_two_processes(tmp_path, fork_server: ForkServer):
    script, out = tmp_path / "talk.py", tmp_path / "output"
    script.write_text(COLLECTIVES)
    assert fork_server.wait(fork_server.popen_ranks([script, out], ranks=2)) == [0, 0]
    for rank in (0, 1):
        output = json.loads((tmp_path / f"output.{rank}").read_text())
        assert output == {
            "rank": rank,
            "sum": [3.0, 20.0],
            "count": 2**41 + 1,
            "any": True,
            "none": False,
            "all": [{"rank": 0, "word": "x"}, {"rank": 1, "word": "xx"}],
            "received": "from 0",
            "main_was_first": True,
        }


@pytest.mark.dist
def test_a_missing_rank_is_an_error_and_not_a_hang(fork_server: ForkServer):
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    lines = """
try:
    DistributedContext(size=2).init_process_group(timeout_s=2)
except LaunchError as error:
    assert "rank 0 of 2 could not connect to the other ranks" in str(error), error
else:
    raise AssertionError("it did not fail")
"""
    run_in_new_process(fork_server, f"os.environ |= {env}{lines}")


RANK_OF_TWO = """
import sys
from datetime import timedelta
import lavic.distributed.wait
from lavic.distributed.signals import StopRequest
from lavic.distributed.context import DistributedContext

lavic.distributed.wait.FIRST_S, lavic.distributed.wait.GRACE_S = 0.2, 0.2
with StopRequest():
    DistributedContext.from_env().init_process_group()
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGINT, 130)])
def test_a_waiting_rank_reports_it_and_stops_on_a_signal(rank, number, code, fork_server: ForkServer):
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"LAVIC_DEVICE": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    process = fork_server.popen(["-c", RANK_OF_TWO], env=os.environ | env)
    expected = f"lavic: rank {rank} of 2: waiting for the other ranks at 127.0.0.1:{env['MASTER_PORT']}"
    while not re.search(f"^{re.escape(expected)}.*\n", process.stderr.read_text(), re.MULTILINE):
        assert not process.gone, process.stderr.read_text()
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "got a stop signal while waiting for the other ranks" in output


def test_signal_handlers_are_restored_after_a_wait():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with InterruptibleWait("rank 0 of 2", "the others"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, before)
