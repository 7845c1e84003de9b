"""What a launcher tells its ranks: the environment variables of torchrun, the deepspeed launcher and srun."""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lavic.errors import ConfigError

_SHARED = {"rank": "RANK", "local_rank": "LOCAL_RANK", "size": "WORLD_SIZE"}
VARIABLES: dict[str, dict[str, str]] = {
    "torchrun": {**_SHARED, "local_world_size": "LOCAL_WORLD_SIZE", "node_rank": "GROUP_RANK"},
    "deepspeed": {**_SHARED, "local_world_size": "LOCAL_SIZE", "node_rank": "CROSS_RANK"},
    "srun": {
        "rank": "SLURM_PROCID",
        "local_rank": "SLURM_LOCALID",
        "size": "SLURM_STEP_NUM_TASKS",
        "node_rank": "SLURM_NODEID",
    },
}
"""Launcher -> field of a `DistributedContext` -> variable."""
_PORTS = range(21_000, 32_000)
_saved_env: dict[str, str | None] = {}
"""Variables that `set_launcher_env` set, with their values before."""


def read_launcher_env(env: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a `DistributedContext`, from the variables of torchrun or the deepspeed launcher, else of srun.

    Empty without a launcher. A batch script's own shell has SLURM_PROCID=0 and the job's SLURM_NTASKS without being a
    rank, so srun's variables count inside a step only (SLURM_STEP_ID). The shell that `salloc` opens on a node is a
    step too, of one task, with the job's SLURM_NTASKS: the step's own count decides.

    Raises:
        ConfigError: Variables that are not numbers, or out of range.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher = "deepspeed" if "CROSS_RANK" in env and "GROUP_RANK" not in env else "torchrun"
    elif "SLURM_PROCID" in env and step_tasks(env) != "1":
        launcher = "srun"
    else:
        return {}
    names = dict(VARIABLES[launcher])
    if launcher == "srun" and not env.get(names["size"]):
        names["size"] = "SLURM_NTASKS"  # some versions of srun do not set the other
    fields: dict[str, Any] = {}
    for key, name in names.items():
        text = env.get(name, "")
        if not text:
            continue
        if not text.isdigit():
            raise ConfigError(f"{name}={text!r} in the environment is not a number; unset it, or start with {launcher}")
        fields[key] = int(text)
    if launcher == "srun":
        fields["local_world_size"] = _tasks_on(fields.get("node_rank", 0), env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    fields = {"local_rank": 0, "local_world_size": fields.get("local_rank", 0) + 1, **fields}
    if fields["rank"] >= fields["size"] or fields["local_rank"] >= fields["local_world_size"]:
        raise ConfigError(
            f"rank {fields['rank']} of {fields['size']} (local rank {fields['local_rank']} of "
            f"{fields['local_world_size']}) is out of range; check {', '.join(names.values())} in the environment"
        )
    return {"launcher": launcher, **fields}


def launched_world_size() -> int:
    """The world size that torchrun, srun or `--nproc` has set; 1 without a launcher."""
    text = os.environ.get("WORLD_SIZE") or step_tasks(os.environ)
    return int(text) if text.isdigit() else 1


def launched_rank() -> int:
    """The rank that the launcher has set; 0 without one."""
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdigit() else 0


def has_own_gpus(visible: int, local_rank: int, env: Mapping[str, str]) -> bool:
    """Whether srun bound the visible GPUs to this rank alone, as one of several tasks."""
    if step_tasks(env) == "1" or env.get("SLURM_LOCALID") != str(local_rank):
        return False  # torchrun gives all of its ranks the same GPUs, also below srun
    per_task = env.get("SLURM_GPUS_PER_TASK") or ("gpu" in env.get("SLURM_TRES_PER_TASK", ""))
    return visible == 1 or bool(per_task)


def step_tasks(env: Mapping[str, str]) -> str:
    """Number of tasks in this process's srun step, as its variable says; "1" outside of a step."""
    return (env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or "1") if "SLURM_STEP_ID" in env else "1"


def _tasks_on(node: int, layout: str) -> int:
    """Tasks on one node from srun's short form: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in layout.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={layout!r} in the environment cannot be read")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[min(node, len(counts) - 1)]


def set_launcher_env(names: Mapping[str, str]) -> None:
    """Sets variables that are not set, and LOCAL_RANK, until `restore_launcher_env`."""
    for name, value in names.items():
        # A wrapper script may have made LOCAL_RANK the task's number, where the task sees its own GPU only.
        if name not in os.environ or name == "LOCAL_RANK":
            _saved_env.setdefault(name, os.environ.get(name))
            os.environ[name] = value


def restore_launcher_env() -> None:
    """Restores what `set_launcher_env` changed, so that a process can form several groups one after the other."""
    while _saved_env:
        name, value = _saved_env.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def free_port() -> int:
    """A TCP port that nothing on this machine listens on now, below those that Linux gives to outgoing connections."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
