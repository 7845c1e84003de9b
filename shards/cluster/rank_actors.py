"""Ranks of a command as Ray actors: `--ray.workers N` runs `describe` and `embed` on a cluster.

Each actor holds one GPU, if the cluster has any, and runs the command in a process with the environment variables of
torchrun. The ranks' output is printed here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lavic.distributed.context import DistributedContext
from lavic.distributed.launcher_env import free_port
from lavic.distributed.rank_process import rank_environment, shell_exit_code
from lavic.distributed.ray_session import RaySettings, ray_session
from lavic.distributed.signals import SIGNALS, forwarded_signals
from lavic.errors import LaunchError, LavicError, Stopped, first_line

_START_TIMEOUT_S = 600.0
"""For nodes that an autoscaler starts."""


def run_on_ray(command: str, argv: Sequence[str], settings: RaySettings) -> int:
    """Runs `lavic COMMAND ARGV` in `settings.workers` ranks on Ray; returns the first exit code that is not 0.

    All nodes need the same lavic, and the files under the same paths.

    Raises:
        LaunchError: Ray cannot be reached, or has not enough resources for the ranks.
    """
    with ray_session(settings):
        import ray

        count = settings.workers or 1
        gpu = 1 if ray.cluster_resources().get("GPU") else 0
        kind = ray.remote(num_cpus=1, num_gpus=gpu, max_concurrency=2)(Rank)
        ranks = [kind.remote() for _ in range(count)]
        placed, waiting = ray.wait([rank.place.remote() for rank in ranks], num_returns=count, timeout=_START_TIMEOUT_S)
        if waiting:
            resource = "GPU" if gpu else "CPU"
            raise LaunchError(
                f"--ray.workers {count}: only {len(placed)} of them got a {resource} within {_START_TIMEOUT_S:.0f} s; "
                "use fewer"
            )
        address, port = ray.get(ranks[0].place.remote())
        contexts = [DistributedContext(rank=number, size=count, node_rank=number) for number in range(count)]
        streams = {
            rank.run.options(num_returns="streaming").remote(
                command, list(argv), context, address, port, str(Path.cwd())
            ): rank
            for rank, context in zip(ranks, contexts, strict=True)
        }
        try:
            with _forwarding(ranks):
                return _follow(streams)
        finally:
            for rank in ranks:
                ray.kill(rank)


class Rank:
    """One rank's actor."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._port = free_port()

    def place(self) -> tuple[str, int]:
        """This node's address and a free port, where the ranks meet if this is the first."""
        import ray

        return ray.util.get_node_ip_address(), self._port

    def run(
        self, command: str, argv: Sequence[str], rank: DistributedContext, address: str, port: int, folder: str
    ) -> Iterator[str | int]:
        """Runs the command; yields its output line by line, then its exit code."""
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "lavic.launch.ranks.local", command, *argv],
            env={**os.environ, **rank_environment(rank, address, port)},
            cwd=folder if Path(folder).is_dir() else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout
        while line := self._process.stdout.readline():  # not a loop over the file: Ray sends values into its generators
            yield line
        yield shell_exit_code(self._process.wait())

    def signal(self, number: int) -> None:
        """Sends a signal to the command."""
        if self._process is not None:
            self._process.send_signal(number)


def _forwarding(ranks: Sequence[Any]) -> AbstractContextManager[None]:
    """Forwards signals to the ranks. They do not reach one that waits for its node or whose node is lost.

    The first Ctrl-C asks a rank to stop after its step, the second interrupts it, the third ends this function's block.
    """

    def send(number: int) -> None:
        for rank in ranks:
            rank.signal.remote(number)

    def interrupt() -> None:
        raise KeyboardInterrupt

    return forwarded_signals(SIGNALS, send, interrupt)


def _follow(streams: Mapping[Any, Any]) -> int:
    """Prints output until every rank has ended, or one has failed; then the others end with their actors."""
    import ray

    open_streams, first = list(streams), 0
    while open_streams:
        (ready,), _ = ray.wait(open_streams, num_returns=1)
        try:
            output = ray.get(next(ready))
        except StopIteration:
            open_streams.remove(ready)
            continue
        except ray.exceptions.RayActorError as error:
            raise LavicError(
                f"a rank was lost, perhaps with its node ({first_line(error)}); run the same command again"
            ) from None
        if isinstance(output, str):
            print(output, end="", flush=True)
        elif output:
            first = first or output
            if output != Stopped.exit_code:  # ranks that stop on request end one by one
                break
    return first
