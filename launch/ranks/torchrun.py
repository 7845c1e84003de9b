"""torchrun on one node of a SLURM job, with four additions that a batch script needs.

- SIGUSR1, SLURM's warning, is forwarded to the ranks. torchrun itself is killed by it (newer versions can treat it like
  SIGTERM, and then end the ranks half a minute later). A rank that still loads receives it when it can handle it.
- The exit code is that of the ranks: 75 where they stopped with a checkpoint. torchrun always returns 1.
- The rank that failed is named, with its node, in one line.
- A wait for the other nodes is announced.

    srun --ntasks-per-node=1 python -m lavic.launch.ranks.torchrun --nnodes 2 --nproc-per-node 8 --master-addr HOST \\
        --master-port PORT --module lavic distill ...

takes torchrun's own flags; the node's number comes from SLURM.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lavic.distributed.failure import exit_process
from lavic.distributed.rank_process import describe_exit, shell_exit_code
from lavic.distributed.wait import FIRST_S
from lavic.errors import Stopped

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_LINGER_S = 3.0
"""srun ends the other nodes as soon as one exits with an error: this gives them time to report their own ranks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs torchrun; returns the exit code of the first rank that failed, 128 + n where signal n killed it.

    Where SIGTERM ended torchrun it is 1.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if "SLURM_NODEID" in os.environ and not any(arg.startswith("--node-rank") for arg in args):
        args = ["--node-rank", os.environ["SLURM_NODEID"], *args]
    if "--module" in args:
        # torchrun reads the ranks' own flags too, and would refuse --nproc as the start of several of its own.
        args.insert(args.index("--module") + 1, "--")
    _forward_to_ranks(signal.SIGUSR1)
    threading.Thread(target=_announce_wait, args=(FIRST_S,), daemon=True).start()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # its failure report is a page long, and lists ranks that stopped on request as failures
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(args)
    except ChildFailedError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = _report(error)
        time.sleep(_LINGER_S)
        return code
    except SignalException:
        return 1  # srun returns the highest code of all nodes: that of the node that failed first, if one did
    return 0


def _announce_wait(after_s: float) -> None:
    """Prints a line when no rank has been started after some seconds: torchrun then waits for the other nodes.

    A signal ends this wait without further action, since torchrun handles none before it starts the ranks.
    """
    time.sleep(after_s)
    if not any(_children()):
        print(f"lavic: {_node()}: waiting for the other nodes for {after_s:g} s", file=sys.stderr, flush=True)


def _forward_to_ranks(number: signal.Signals) -> None:
    """Starts a thread that waits for a signal and sends it to the ranks.

    The signal stays blocked in this process and, by inheritance, in the ranks: if it comes while they load, it is
    delivered when they unblock it (`StopRequest`) and does not kill them.
    """
    signal.signal(number, signal.SIG_DFL)  # where the parent ignored it, it would be discarded
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})

    def forward() -> None:
        while True:
            signal.sigwait({number})
            for pid in _children():
                os.kill(pid, number)

    threading.Thread(target=forward, daemon=True).start()


def _children() -> Iterator[int]:
    """Ids of this process's children."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # the process's name, in brackets, may contain anything; state and parent follow it
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            except (OSError, IndexError):
                continue  # the process has ended
            if parent == str(os.getpid()):
                yield int(folder.name)


def _report(error: ChildFailedError) -> int:
    """Names the rank that failed first, unless the ranks stopped on request; returns the exit code."""
    # torchrun ends the other ranks when one has ended: their signals come later and are not the cause
    not_causes = (Stopped.exit_code, -signal.SIGTERM, -signal.SIGKILL)
    codes = {failure.exitcode for failure in error.failures.values()}
    if Stopped.exit_code in codes and codes <= set(not_causes):
        return Stopped.exit_code
    failures = error.failures.items()
    causes = [(rank, failure) for rank, failure in failures if failure.exitcode != -signal.SIGTERM] or failures
    rank, failure = min(causes, key=lambda rank_and_failure: rank_and_failure[1].timestamp)
    print(f"lavic: rank {rank} on {_node()} {describe_exit(failure.exitcode)}", file=sys.stderr, flush=True)
    return shell_exit_code(failure.exitcode)


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


if __name__ == "__main__":
    exit_process(main())
