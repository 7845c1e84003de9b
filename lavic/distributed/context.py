"""The processes of one run: who this one is, and what they tell each other."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

from lavic.distributed.wait import Waiting
from lavic.errors import ConfigError, LaunchError, Stopped, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_LAUNCHERS: dict[str, dict[str, str]] = {
    "torchrun": {
        "rank": "RANK",
        "local_rank": "LOCAL_RANK",
        "size": "WORLD_SIZE",
        "local_size": "LOCAL_WORLD_SIZE",
        "node": "GROUP_RANK",
    },
    "deepspeed": {
        "rank": "RANK",
        "local_rank": "LOCAL_RANK",
        "size": "WORLD_SIZE",
        "local_size": "LOCAL_SIZE",
        "node": "CROSS_RANK",
    },
    "srun": {
        "rank": "SLURM_PROCID",
        "local_rank": "SLURM_LOCALID",
        "size": "SLURM_STEP_NUM_TASKS",
        "node": "SLURM_NODEID",
    },
}
_PORTS = range(21_000, 32_000)
_lent: dict[str, str | None] = {}
"""Variables that `start` set, with their values before: `close` puts these back, and one process can then start one
world after another."""


@dataclass(frozen=True)
class World:
    """One process among `size`: read once from the environment, then passed as a value.

    Until `start`, and for a world of one, the collective methods answer without talking to anybody.
    """

    rank: int = 0
    """This process among all, 0 to size - 1."""
    local_rank: int = 0
    """This process among those of its node."""
    size: int = 1
    """Processes in all."""
    local_size: int = 1
    """Processes on this node."""
    node: int = 0
    """This node among all."""
    launcher: Literal["", "torchrun", "deepspeed", "srun"] = ""
    """Whose variables were believed; "" for a world of one that nobody launched."""

    @staticmethod
    def from_env(env: Mapping[str, str] | None = None) -> World:
        """Reads the variables of torchrun or of the deepspeed launcher, else srun's, else answers a world of one.

        A batch script's own shell has SLURM_PROCID=0 and the job's SLURM_NTASKS without being a rank, so srun's are
        believed inside a step only (SLURM_STEP_ID). The shell that `salloc` opens on a node is a step too, of one task,
        with the job's SLURM_NTASKS: the step's own count decides.

        Raises:
            ConfigError: variables that are no numbers or contradict each other.
        """
        env = os.environ if env is None else env
        if "RANK" in env and "WORLD_SIZE" in env:
            return _read("deepspeed" if "CROSS_RANK" in env and "GROUP_RANK" not in env else "torchrun", env)
        if "SLURM_PROCID" in env and step_tasks(env) != "1":
            return _read("srun", env)
        return World()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and speaks."""
        return self.rank == 0

    @property
    def started(self) -> bool:
        """Whether this process is in a torch.distributed group."""
        import torch.distributed as dist

        return dist.is_available() and dist.is_initialized()

    def device(self) -> torch.device:
        """This rank's device: its GPU, or the CPU where there is none or LAVIC_DEVICE=cpu.

        Raises:
            LaunchError: there are GPUs, but fewer than ranks on this node.
        """
        import torch

        if os.environ.get("LAVIC_DEVICE", "") == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.gpu(torch.cuda.device_count(), os.environ))

    def gpu(self, visible: int, env: Mapping[str, str]) -> int:
        """Index of this rank's GPU among those that it sees.

        Ranks of a node usually see all of its GPUs, and each takes that of its local rank. A task of srun may see its
        own GPUs only (`--gpus-per-task`, `--gpu-bind`), numbered from 0.

        Args:
            visible: GPUs that this process sees.
            env: The process's environment.

        Raises:
            LaunchError: There are fewer than ranks on this node, and they are not this rank's own.
        """
        if self.local_rank < visible:
            return self.local_rank
        if visible and _sees_its_own(visible, self.local_rank, env):
            return self.local_rank % visible
        raise LaunchError(
            f"rank {self.rank} wants GPU {self.local_rank} of this node, which shows {visible}; start at most "
            f"{visible} processes per node, or set LAVIC_DEVICE=cpu"
        )

    def start(self, timeout_s: float = 600) -> None:
        """Joins the torch.distributed group: NCCL on GPUs, gloo on CPUs. Also for a world of one; twice is once.

        Args:
            timeout_s: how long one collective may take before it raises.

        Raises:
            LaunchError: the others did not come, or MASTER_ADDR and MASTER_PORT are missing in a world of several.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed import HashStore  # type: ignore[attr-defined]

        if self.started:
            return
        device = self.device()
        # Libraries that look for a launcher (DeepSpeed) read torchrun's names, whatever started us.
        names = {name: str(getattr(self, key)) for key, name in _LAUNCHERS["torchrun"].items()}
        if device.type == "cuda":
            # DeepSpeed takes the GPU of this index.
            names["LOCAL_RANK"] = str(device.index)
        if self.size == 1:
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in names and not os.environ.get(name)]
        if missing:
            raise LaunchError(
                f"{' and '.join(missing)} not set: start the {self.size} ranks with torchrun or --nproc, or export "
                "the first node's name and a free port before srun"
            )
        _lend(names)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        waiting = Waiting(f"rank {self.rank} of {self.size}", f"the other ranks at {where}")
        try:
            with waiting if self.size > 1 else nullcontext():
                dist.init_process_group(
                    "nccl" if device.type == "cuda" else "gloo",
                    rank=self.rank,
                    world_size=self.size,
                    # a port that is free now may be another's a moment later: alone, none is needed
                    store=HashStore() if self.size == 1 else None,
                    timeout=timedelta(seconds=timeout_s),
                )
        except (RuntimeError, ValueError) as error:
            _take_back()
            why = first_line(error)
            raise LaunchError(f"rank {self.rank} of {self.size} could not meet the others: {why}") from error

    def close(self) -> None:
        """Leaves the group, if this process is in one, and takes back what `start` put into the environment."""
        import torch.distributed as dist

        if self.started:
            dist.destroy_process_group()
        _take_back()

    @contextmanager
    def together(self, timeout_s: float = 600) -> Iterator[None]:
        """In the group for the length of a block, which all ranks leave when the last of them has come to its end.

        A launcher ends the others soon after one rank has left, with or without an error: rank 0 must have closed its
        files by then. That holds for a stop on request too, in which all ranks agree.

        After any other error nobody waits for anybody, and the group stays: NCCL takes it down with all ranks
        together, and the others will not come. The process must say what happened and end (`failure.leave`).

        Args:
            timeout_s: see `start`.
        """
        self.start(timeout_s)
        try:
            yield
            self.barrier()
        except Stopped:
            if self.size > 1 and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # on its way out, with nothing to lose but its exit code
            self.barrier()
            self.close()
            raise
        except BaseException:
            if self.size == 1:
                self.close()
            raise
        self.close()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor (same shape and type on each), on the device of `value`; a new tensor."""
        import torch.distributed as dist

        if self._alone():
            return value.clone()
        total = value.detach().to(self.device(), copy=True)
        dist.all_reduce(total)
        return total.to(value.device)

    def agree(self, flag: bool) -> bool:
        """True on every rank as soon as `flag` is true on any: ranks that act on it act together."""
        import torch

        if self._alone():
            return flag
        return bool(self.sum(torch.tensor(int(flag))).item())

    def gather(self, value: T) -> list[T]:
        """Every rank's value (anything picklable), in the order of ranks, on all ranks."""
        import torch.distributed as dist

        if self._alone():
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        import torch.distributed as dist

        if self._alone():
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=self.device())
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Waits until every rank is here."""
        import torch

        if not self._alone():
            # Unlike dist.barrier(), a sum needs no device told under NCCL.
            self.sum(torch.zeros(1))

    def _alone(self) -> bool:
        if self.size == 1:
            return True
        if not self.started:
            raise RuntimeError(f"World.start() comes before talking to {self.size - 1} other ranks")
        return False


def free_port() -> int:
    """A TCP port that nothing on this machine listens on right now.

    Seconds may pass before somebody does: it lies below those that Linux gives to outgoing connections.
    """
    for port in random.SystemRandom().sample(_PORTS, 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _lend(names: Mapping[str, str]) -> None:
    for name, value in names.items():
        # A wrapper script may have made LOCAL_RANK the task's number, where the task sees its own GPU only.
        if name not in os.environ or name == "LOCAL_RANK":
            _lent.setdefault(name, os.environ.get(name))
            os.environ[name] = value


def _take_back() -> None:
    while _lent:
        name, value = _lent.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _sees_its_own(visible: int, local_rank: int, env: Mapping[str, str]) -> bool:
    """Whether the GPUs that a rank sees are its alone: it is one of several tasks of srun, which bound them to it."""
    if step_tasks(env) == "1" or env.get("SLURM_LOCALID") != str(local_rank):
        return False  # torchrun gives all of its ranks the same GPUs, also below srun
    per_task = env.get("SLURM_GPUS_PER_TASK") or ("gpu" in env.get("SLURM_TRES_PER_TASK", ""))
    return visible == 1 or bool(per_task)


def step_tasks(env: Mapping[str, str]) -> str:
    """How many tasks srun started in this process's step, as its variable says; "1" outside of a step."""
    return (env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or "1") if "SLURM_STEP_ID" in env else "1"


def _read(launcher: Literal["torchrun", "deepspeed", "srun"], env: Mapping[str, str]) -> World:
    names = dict(_LAUNCHERS[launcher])
    if launcher == "srun" and not env.get(names["size"]):
        names["size"] = "SLURM_NTASKS"  # not every srun sets the other
    found: dict[str, int] = {}
    for key, name in names.items():
        text = env.get(name, "")
        if not text:
            continue
        if not text.isdigit():
            raise ConfigError(
                f"{name}={text!r} in the environment is no rank or count; unset it or start with {launcher}"
            )
        found[key] = int(text)
    if launcher == "srun":
        found["local_size"] = _tasks_on(found.get("node", 0), env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    world = World(launcher=launcher, **{"local_size": found.get("local_rank", 0) + 1, **found})
    if world.rank >= world.size or world.local_rank >= world.local_size:
        raise ConfigError(
            f"rank {world.rank} of {world.size} (local {world.local_rank} of {world.local_size}) cannot be; "
            f"check {', '.join(names.values())} in the environment"
        )
    return world


def _tasks_on(node: int, layout: str) -> int:
    """Tasks on one node from srun's short form: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in layout.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={layout!r} in the environment cannot be read")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[min(node, len(counts) - 1)]
