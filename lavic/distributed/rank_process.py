"""Processes that run ranks, for their launchers: environment and exit status."""

from __future__ import annotations

import os
import signal

from lavic.distributed.context import DistributedContext

LAUNCHER_PID = "LAVIC_LAUNCHER_PID"
"""Environment variable with the process that started a rank: the rank ends when that process has ended."""


def rank_environment(rank: DistributedContext, address: str, port: int) -> dict[str, str]:
    """The variables by which torchrun describes a rank; rank 0 can be reached at `address` and `port`."""
    rendezvous = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return rank.torchrun_env() | rendezvous | {LAUNCHER_PID: str(os.getpid())}


def exit_name(code: int) -> str:
    """A process's return code in words: `exit code 3`, or the name of the signal that killed it."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def describe_exit(code: int) -> str:
    """How a process ended, by its return code: a negative one is the signal that killed it."""
    if code >= 0:
        return f"exited with code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was killed by {exit_name(code)}{hint}"


def shell_exit_code(code: int) -> int:
    """A return code as a shell reports it: 128 + n for a process that signal n killed."""
    return 128 - code if code < 0 else code
