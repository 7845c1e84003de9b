"""torchrun on one node of a SLURM job, with four things that a batch script needs and torchrun lacks.

- SIGUSR1, SLURM's warning, reaches the ranks. Alone, torchrun dies of it (newer ones can be told to treat it like
  SIGTERM, and then end the ranks half a minute later). A rank that is still loading keeps it until it can heed it.
- The exit code is that of the ranks: 75 where they stopped with a checkpoint. torchrun says 1 whatever happened.
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
from lavic.distributed.wait import FIRST_S
from lavic.errors import Stopped

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_LINGER_S = 3.0
"""srun ends the other nodes as soon as one leaves with an error: first let them see what became of their own ranks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs torchrun; returns the exit code of the first rank that failed: 128 + n where signal n ended it, 1 where
    this process was told to end."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "SLURM_NODEID" in os.environ and not any(word.startswith("--node-rank") for word in words):
        words = ["--node-rank", os.environ["SLURM_NODEID"], *words]
    _hand_on(signal.SIGUSR1)
    threading.Thread(target=_announce, args=(FIRST_S,), daemon=True).start()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # Its report of a failure is a page long, and calls a rank that stopped on request a failure too.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(words)
    except ChildFailedError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = _say(error)
        time.sleep(_LINGER_S)
        return code
    except SignalException:
        return 1  # srun takes the highest code of all nodes: that of the node where it began, if it began on one
    return 0


def _announce(after_s: float) -> None:
    """Says so when no rank has been started after some seconds: torchrun then waits for the other nodes.

    A signal ends such a wait by itself, since torchrun handles none before it starts the ranks.
    """
    time.sleep(after_s)
    if not any(_children()):
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        print(f"lavic: {node}: waiting for the other nodes, for {after_s:g} s so far", file=sys.stderr, flush=True)


def _hand_on(number: signal.Signals) -> None:
    """Has a thread wait for a signal and send it to the ranks.

    The signal stays blocked, here and, since that is inherited, in the ranks: one that comes while they load waits
    until they unblock it (`StopRequest`) instead of killing them.
    """
    signal.signal(number, signal.SIG_DFL)  # a parent that ignored it would have had it thrown away
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})

    def wait() -> None:
        while True:
            signal.sigwait({number})
            for pid in _children():
                os.kill(pid, number)

    threading.Thread(target=wait, daemon=True).start()


def _children() -> Iterator[int]:
    """Processes whose parent this one is."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # The name, in brackets, may hold anything; behind it stand state and parent.
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            except (OSError, IndexError):
                continue  # gone meanwhile
            if parent == str(os.getpid()):
                yield int(folder.name)


def _say(error: ChildFailedError) -> int:
    """Says which rank failed, unless they stopped on request; returns the exit code."""
    # The launcher ends the others when one has left: not what happened first.
    ended = (Stopped.exit_code, -signal.SIGTERM, -signal.SIGKILL)
    codes = {failure.exitcode for failure in error.failures.values()}
    if Stopped.exit_code in codes and codes <= set(ended):
        return Stopped.exit_code
    first = [one for one in error.failures.items() if one[1].exitcode != -signal.SIGTERM] or error.failures.items()
    rank, failure = min(first, key=lambda one: one[1].timestamp)
    code = failure.exitcode
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        what = f"was ended by {signal.Signals(-code).name}{hint}"
    else:
        what = f"left with exit code {code}"
    print(f"lavic: rank {rank} on {node} {what}", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    exit_process(main())
