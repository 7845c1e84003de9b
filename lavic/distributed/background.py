"""Processes that run beside a rank: they cannot slow it, and end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def start_background(
    module: str, run_dir: Path, *args: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts `python -m MODULE RUN_DIR ARGS... PARENT_PID` in a session of its own, which Ctrl-C does not reach.

    The process id is an argument since a parent that is killed at once has exited before the child can ask for it.
    """
    command = [sys.executable, "-m", module, str(run_dir.absolute()), *args, str(os.getpid())]
    limits = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env={**os.environ, **limits, **(env or {})}, start_new_session=True
    )


def run_in_background() -> None:
    """Lowers this process's priority and ignores stop signals, which a scheduler sends to every process of a job.

    The process ends by itself when its parent has exited, or is killed by the parent.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
