"""Starts the ranks of one command on this machine: `--nproc N`, without torchrun.

Signals sent to this process are forwarded to every rank, the first rank that fails ends the others, and its exit code
(2: bad input, 75: stopped with a checkpoint) becomes this process's.

    python -m lavic.launch.ranks.local COMMAND ...

is what each rank runs: the command itself, in a process that ends when its launcher has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from lavic.distributed.context import DistributedContext
from lavic.distributed.launcher_env import free_port
from lavic.distributed.rank_process import LAUNCHER_PID, describe_exit, rank_environment, shell_exit_code
from lavic.distributed.signals import forwarded_signals
from lavic.errors import LaunchError, Stopped

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def run(
    command: str, argv: Sequence[str], nproc: int, *, grace_s: float = 30.0, program: Sequence[str] | None = None
) -> int:
    """Runs `lavic COMMAND ARGV` in `nproc` ranks on this machine and waits for them.

    Args:
        command: The command's name ("distill").
        argv: Its arguments.
        nproc: Number of ranks: one per GPU, or any number where there is none.
        grace_s: Seconds between SIGTERM and SIGKILL for the other ranks, once one has failed.
        program: What to run instead of `lavic COMMAND`.

    Returns:
        0 if all ranks returned 0, else the exit code of the first that failed; 128 + n if signal n killed it.

    Raises:
        LaunchError: More ranks than visible GPUs, or fewer than one.
    """
    check_nproc(nproc)
    args = [*(program or (sys.executable, "-m", "lavic.launch.ranks.local", command)), *argv]
    ranks: list[subprocess.Popen[bytes]] = []

    def send(number: int) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    port = free_port()
    with forwarded_signals(_FORWARDED, send, kill=lambda: send(signal.SIGKILL)):
        try:
            for rank in range(nproc):
                ranks.append(_start(args, nproc, rank, port))
            return _wait(command, ranks, grace_s)
        finally:
            _end(ranks, 0.0)


def check_nproc(nproc: int) -> None:
    """Raises LaunchError where this machine cannot run `nproc` ranks."""
    if nproc < 1:
        raise LaunchError(f"--nproc {nproc}: must be at least 1")
    gpus = visible_gpus()
    if gpus and nproc > gpus:
        raise LaunchError(
            f"--nproc {nproc}: this machine shows {gpus} GPU{'s' if gpus > 1 else ''}; use --nproc {gpus} or fewer, "
            "or LAVIC_DEVICE=cpu"
        )


def visible_gpus() -> int:
    """Number of GPUs that ranks would use: 0 with LAVIC_DEVICE=cpu or without CUDA."""
    if os.environ.get("LAVIC_DEVICE") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _start(args: Sequence[str], nproc: int, number: int, port: int) -> subprocess.Popen[bytes]:
    rank = DistributedContext(rank=number, local_rank=number, size=nproc, local_world_size=nproc)
    env = {
        # ranks of one machine need no other network, and gloo fails if the host name does not resolve
        "GLOO_SOCKET_IFNAME": "lo",
        # ranks that each use every core slow each other down
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc)),
        **os.environ,
        **rank_environment(rank, "127.0.0.1", port),
    }
    # In its own session: Ctrl-C in the terminal reaches only this process, which forwards it once.
    return subprocess.Popen(args, env=env, stdin=subprocess.DEVNULL, start_new_session=True)


def _wait(command: str, ranks: Sequence[subprocess.Popen[bytes]], grace_s: float) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [(number, code) for number, code in enumerate(codes) if code]
        if failed:
            # an exit code says more than the signal that killed another rank afterwards
            number, code = min(failed, key=lambda rank_and_code: rank_and_code[1] < 0)
            # Ranks agree to stop: when one has stopped, the others are saving and are only waited for.
            _end(ranks, grace_s, terminate=code != Stopped.exit_code)
            if code < 0:
                print(f"lavic {command}: rank {number} {describe_exit(code)}", file=sys.stderr)
            return shell_exit_code(code)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen[bytes]], grace_s: float, *, terminate: bool = True) -> None:
    """Waits until every rank has ended: with SIGTERM first, and SIGKILL after `grace_s`."""
    running = [rank for rank in ranks if rank.poll() is None]
    if terminate:
        for rank in running:
            rank.terminate()
    deadline = time.monotonic() + grace_s
    while running and time.monotonic() < deadline:
        time.sleep(0.05)
        running = [rank for rank in running if rank.poll() is None]
    for rank in running:
        rank.kill()
        rank.wait()


def _end_with_launcher() -> None:
    """Has the kernel send SIGTERM when the launcher ends (Linux), so that no rank is left that holds a GPU."""
    launcher = os.environ.get(LAUNCHER_PID, "")
    if not launcher or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(launcher):
        raise SystemExit(128 + signal.SIGTERM)


def _exit_1_when_srun_ends_it() -> None:
    """Has a rank that srun started exit with 1 on SIGTERM.

    When one task has failed, srun ends the others and returns the highest exit code: 143 would hide the first one.
    """
    if "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ:
        from lavic.distributed.failure import exit_process

        signal.signal(signal.SIGTERM, lambda number, frame: exit_process(1))


if __name__ == "__main__":
    _end_with_launcher()
    _exit_1_when_srun_ends_it()
    from lavic.cli import entry

    entry()
