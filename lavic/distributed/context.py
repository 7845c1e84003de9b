"""The ranks of one run: which one this process is, and the collectives between them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

from lavic.distributed.launcher_env import (
    VARIABLES,
    has_own_gpus,
    read_launcher_env,
    restore_launcher_env,
    set_launcher_env,
)
from lavic.distributed.wait import InterruptibleWait
from lavic.errors import LaunchError, Stopped, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This process among all ranks: read once from the environment, then passed as a value.

    With a world size of 1, the collective methods return without a process group.
    """

    rank: int = 0
    """Global rank, 0 to size - 1."""
    local_rank: int = 0
    """Rank on this node."""
    size: int = 1
    """World size: processes on all nodes."""
    local_world_size: int = 1
    """Processes on this node."""
    node_rank: int = 0
    """This node among all nodes."""
    launcher: Literal["", "torchrun", "deepspeed", "srun"] = ""
    """Whose variables were read; "" without a launcher."""

    @staticmethod
    def from_env(env: Mapping[str, str] | None = None) -> DistributedContext:
        """Reads the launcher's variables, see `read_launcher_env`; a single process without a launcher.

        Raises:
            ConfigError: Variables that are not numbers, or out of range.
        """
        return DistributedContext(**read_launcher_env(os.environ if env is None else env))

    def torchrun_env(self) -> dict[str, str]:
        """The variables by which torchrun describes this rank."""
        return {name: str(getattr(self, key)) for key, name in VARIABLES["torchrun"].items()}

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def must_start(self, nproc: int) -> bool:
        """Whether this process is to start `nproc` ranks on this machine: no launcher started it as a rank.

        torchrun may have started it as the only one. A cluster that gives every container RANK and WORLD_SIZE has not.
        """
        return nproc > 1 and self.size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ

    @property
    def is_initialized(self) -> bool:
        """Whether this process is in a process group of torch.distributed."""
        import torch.distributed as dist

        return dist.is_available() and dist.is_initialized()

    def device(self) -> torch.device:
        """This rank's device: its GPU, or the CPU where there is none or LAVIC_DEVICE=cpu.

        Raises:
            LaunchError: This node has GPUs, but fewer than ranks.
        """
        import torch

        if os.environ.get("LAVIC_DEVICE", "") == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.gpu_index(torch.cuda.device_count(), os.environ))

    def gpu_index(self, visible: int, env: Mapping[str, str]) -> int:
        """Index of this rank's GPU among the `visible` ones of this process, whose environment is `env`.

        Ranks of a node usually see all of its GPUs, and each takes that of its local rank. A task of srun may see its
        own GPUs only (`--gpus-per-task`, `--gpu-bind`), numbered from 0.

        Raises:
            LaunchError: There are fewer than ranks on this node, and they are not bound to this rank alone.
        """
        if self.local_rank < visible:
            return self.local_rank
        if visible and has_own_gpus(visible, self.local_rank, env):
            return self.local_rank % visible
        raise LaunchError(
            f"rank {self.rank} needs GPU {self.local_rank}, but {visible} are visible on this node; start at most "
            f"{visible} processes per node, or set LAVIC_DEVICE=cpu"
        )

    def init_process_group(self, timeout_s: float = 600) -> None:
        """Joins the process group: NCCL on GPUs, gloo on CPUs. Does nothing where this process is in one already.

        A collective raises an error after `timeout_s`. Raises LaunchError where the other ranks did not
        connect, or MASTER_ADDR or MASTER_PORT is missing.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed import HashStore  # type: ignore[attr-defined]

        if self.is_initialized:
            return
        device = self.device()
        # DeepSpeed reads torchrun's variables, whichever launcher started this process.
        names = self.torchrun_env()
        if device.type == "cuda":
            # DeepSpeed uses the GPU of this index.
            names["LOCAL_RANK"] = str(device.index)
        if self.size == 1:
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in names and not os.environ.get(name)]
        if missing:
            raise LaunchError(
                f"{' and '.join(missing)} not set: start the {self.size} ranks with torchrun or --nproc, or export "
                "the first node's name and a free port before srun"
            )
        set_launcher_env(names)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        wait = InterruptibleWait(f"rank {self.rank} of {self.size}", f"the other ranks at {address}")
        try:
            with wait if self.size > 1 else nullcontext():
                dist.init_process_group(
                    "nccl" if device.type == "cuda" else "gloo",
                    rank=self.rank,
                    world_size=self.size,
                    # A single process needs no port, which another process might take in the meantime.
                    store=HashStore() if self.size == 1 else None,
                    timeout=timedelta(seconds=timeout_s),
                )
        except (RuntimeError, ValueError) as error:
            restore_launcher_env()
            raise LaunchError(
                f"rank {self.rank} of {self.size} could not connect to the other ranks at {address}: "
                f"{first_line(error)}"
            ) from error

    def destroy_process_group(self) -> None:
        """Leaves the process group, if this process is in one, and restores the environment."""
        import torch.distributed as dist

        if self.is_initialized:
            # Once DeepSpeed has been used it keeps groups of its own, which only it can release: the next group of this
            # process would meet them.
            comm = sys.modules.get("deepspeed.comm.comm")
            (comm if comm is not None and comm.cdb is not None else dist).destroy_process_group()
        restore_launcher_env()

    @contextmanager
    def process_group(self, timeout_s: float = 600) -> Iterator[None]:
        """A process group for the length of a block, which every rank leaves when all have reached its end.

        A group that this process was in before stays open: it is the caller's.

        A launcher ends the other ranks soon after one has exited, with or without an error: rank 0 must have closed its
        files by then. That holds for a stop on request too, on which all ranks agree.

        After any other error no rank waits for another, and the group is not destroyed: NCCL destroys it with all ranks
        together, and the others will not get here. The process must report the error and end
        (`failure.exit_process`).
        """
        if self.is_initialized:
            yield
            return
        self.init_process_group(timeout_s)
        try:
            yield
            self.barrier()
        except Stopped:
            if self.size > 1 and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it exits anyway, and keeps its exit code
            self.barrier()
            self.destroy_process_group()
            raise
        except BaseException:
            if self.size == 1:
                self.destroy_process_group()
            raise
        self.destroy_process_group()

    def all_reduce(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor (same shape and type on each), on the device of `value`; a new tensor."""
        import torch.distributed as dist

        if self._is_single():
            return value.clone()
        total = value.detach().to(self.device(), copy=True)
        dist.all_reduce(total)
        return total.to(value.device)

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank: the same answer on all of them."""
        import torch

        if self._is_single():
            return flag
        return bool(self.all_reduce(torch.tensor(int(flag))).item())

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value (any picklable object) in the order of ranks, on all ranks."""
        import torch.distributed as dist

        if self._is_single():
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value (any picklable object) on all ranks."""
        import torch.distributed as dist

        if self._is_single():
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=self.device())
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Waits until every rank has called it."""
        import torch

        if not self._is_single():
            # Unlike dist.barrier(), this needs no device_ids under NCCL.
            self.all_reduce(torch.zeros(1))

    def _is_single(self) -> bool:
        if self.size == 1:
            return True
        if not self.is_initialized:
            raise RuntimeError(f"call init_process_group() before a collective of {self.size} ranks")
        return False
