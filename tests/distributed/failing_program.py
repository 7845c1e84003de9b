"""Two ranks, of which one fails and the other does not notice, under a group that is only taken down by all together.

A program for test_failure.py: `failing_program.py FOLDER KIND...` runs each kind as `lavic distill` in two forked
ranks. The rank that fails writes what it says to FOLDER/KIND.log and its exit code to FOLDER/KIND.code.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from lavic import cli
from lavic.distributed.context import DistributedContext
from lavic.distributed.failure import show_error_first
from lavic.distributed.launcher_env import free_port
from lavic.errors import LavicError
from lavic.train.input.data_loader import prefetch


def memory() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB is "
        "free. Including non-PyTorch memory, this process has 78.09 GiB memory in use."
    )


def host_memory() -> None:
    torch.empty(1 << 60)


def worker() -> None:
    def die(number: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number

    next(prefetch(die, [0], 1))


def unreadable() -> None:
    def fail(number: int) -> int:
        raise LavicError("shard 7 cannot be read")

    next(prefetch(fail, [0], 1))


def disk() -> None:
    Path("/dev/full").write_text("x" * 100_000)


def callback() -> None:
    raise KeyError("perplexity")


FAILS: dict[str, tuple[int, Callable[[], None]]] = {
    "memory": (1, memory),
    "host-memory": (0, host_memory),
    "worker": (1, worker),
    "unreadable": (1, unreadable),
    "disk": (0, disk),
    "callback": (1, callback),
}
"""Kind -> the rank that fails, and how."""


def main(argv: Sequence[str]) -> int:
    """The command."""
    rank, fail = FAILS[argv[0]]
    world = DistributedContext.from_env()
    with world.process_group(timeout_s=60):
        dist.destroy_process_group = lambda *_: time.sleep(600)
        try:
            with show_error_first("distill"):
                world.barrier()
                if world.rank != rank:
                    time.sleep(600)  # as in a collective of NCCL
                fail()
        finally:
            time.sleep(0.2)  # whatever closes on the way out
    return 0


def run(folder: Path, kind: str) -> None:
    """Forks two ranks and waits for the one that fails."""
    port, pids = str(free_port()), []
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            log = os.open(folder / f"{kind}.log" if rank == FAILS[kind][0] else os.devnull, os.O_CREAT | os.O_WRONLY)
            os.dup2(log, 2)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
            sys.argv = ["lavic", "distill", kind]
            cli.entry()
        pids.append(pid)
    failed = pids.pop(FAILS[kind][0])
    code = os.waitstatus_to_exitcode(os.waitpid(failed, 0)[1])
    (folder / f"{kind}.code").write_text(str(code))
    os.kill(pids[0], signal.SIGKILL)
    os.waitpid(pids[0], 0)


if __name__ == "__main__":
    sys.modules["tests.failing_program"] = sys.modules["__main__"]
    cli.COMMANDS["distill"] = ("tests.failing_program", "")
    os.environ |= {"LAVIC_DEVICE": "cpu", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    for kind in sys.argv[2:]:
        run(Path(sys.argv[1]), kind)
