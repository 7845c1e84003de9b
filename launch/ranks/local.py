"""Starts the ranks of one command on this machine: `--nproc N`, without torchrun.

Signals sent to this process reach every rank once, the first rank that fails ends the others, and its exit code (2: bad
input, 75: stopped with a checkpoint) becomes this one's.

    python -m lavic.launch.ranks.local COMMAND ...

is what each rank runs: the command itself, in a process that goes when the one that started it is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from lavic.distributed.launcher_env import free_port
from lavic.errors import LaunchError, Stopped

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_PARENT = "LAVIC_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1


def run(
    command: str, argv: Sequence[str], nproc: int, *, grace_s: float = 30.0, program: Sequence[str] | None = None
) -> int:
    """Runs `lavic COMMAND ARGV` in `nproc` ranks on this machine and waits for them.

    Args:
        command: the command's name as typed ("distill").
        argv: its words.
        nproc: ranks; one per GPU, or any number where there is none.
        grace_s: seconds between asking the others to end and killing them, once one has failed.
        program: what to run instead of `lavic COMMAND`.

    Returns:
        0 when every rank did, else the exit code of the first that failed; 128 + n where signal n ended it.

    Raises:
        LaunchError: more ranks than visible GPUs, or fewer than one.
    """
    check(nproc)
    words = [*(program or (sys.executable, "-m", "lavic.launch.ranks.local", command)), *argv]
    ranks: list[subprocess.Popen[bytes]] = []
    port = free_port()
    with _forwarding(ranks):
        try:
            for rank in range(nproc):
                ranks.append(_start(words, nproc, rank, port))
            return _wait(command, ranks, grace_s)
        finally:
            _end(ranks, 0.0)


def check(nproc: int) -> None:
    """Raises LaunchError where this machine cannot hold `nproc` ranks."""
    if nproc < 1:
        raise LaunchError(f"--nproc {nproc}: at least 1")
    gpus = visible_gpus()
    if gpus and nproc > gpus:
        raise LaunchError(
            f"--nproc {nproc}: this machine shows {gpus} GPU{'s' if gpus > 1 else ''}; use --nproc {gpus} or fewer, "
            "or LAVIC_DEVICE=cpu"
        )


def visible_gpus() -> int:
    """GPUs that ranks would use: 0 with LAVIC_DEVICE=cpu or without CUDA."""
    if os.environ.get("LAVIC_DEVICE") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _start(words: Sequence[str], nproc: int, rank: int, port: int) -> subprocess.Popen[bytes]:
    env = {
        # One machine needs no other network, and a host name that does not resolve would stop gloo.
        "GLOO_SOCKET_IFNAME": "lo",
        # Ranks that each take every core slow each other down.
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _PARENT: str(os.getpid()),
    }
    # A session of its own: the terminal's Ctrl-C comes to this process alone, which passes it on once.
    return subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, start_new_session=True)


@contextlib.contextmanager
def _forwarding(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Passes signals on to the ranks. A third Ctrl-C kills them."""
    interrupts = 0

    def forward(number: int, _: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL if interrupts > 2 else number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(command: str, ranks: Sequence[subprocess.Popen[bytes]], grace_s: float) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [(number, code) for number, code in enumerate(codes) if code]
        if failed:
            # a code that a rank said before one that it was ended with
            number, code = min(failed, key=lambda one: one[1] < 0)
            if code == Stopped.exit_code:
                # Every rank has agreed to stop; the others are on their way out and must not be hurried.
                _end(ranks, grace_s, ask=False)
            else:
                _end(ranks, grace_s)
            if code < 0:
                name = signal.Signals(-code).name
                hint = " (out of memory?)" if code == -signal.SIGKILL else ""
                print(f"lavic {command}: rank {number} was ended by {name}{hint}", file=sys.stderr)
            return 128 - code if code < 0 else code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen[bytes]], grace_s: float, *, ask: bool = True) -> None:
    """Waits until every rank is gone: asked with SIGTERM first, killed after `grace_s`."""
    alive = [rank for rank in ranks if rank.poll() is None]
    if ask:
        for rank in alive:
            rank.terminate()
    until = time.monotonic() + grace_s
    while alive and time.monotonic() < until:
        time.sleep(0.05)
        alive = [rank for rank in alive if rank.poll() is None]
    for rank in alive:
        rank.kill()
        rank.wait()


def _stay_with_launcher() -> None:
    """Has the kernel send SIGTERM when the launcher dies (Linux), so that no rank is left holding a GPU."""
    parent = os.environ.get(_PARENT, "")
    if not parent or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):
        raise SystemExit(128 + signal.SIGTERM)


def _give_way() -> None:
    """Has a rank that srun started itself say 1 when srun ends it.

    srun ends all when one has failed, and its own exit code is the highest of them: 143 would hide why it began.
    """
    if "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ:
        from lavic.distributed.failure import exit_process

        signal.signal(signal.SIGTERM, lambda number, frame: exit_process(1))


if __name__ == "__main__":
    _stay_with_launcher()
    _give_way()
    from lavic.cli import entry

    entry()
