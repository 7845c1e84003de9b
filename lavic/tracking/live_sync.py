"""Sends a run to MLflow during the run, from a process of its own.

    python -m lavic.tracking.live_sync RUN_DIR URI PARENT_PID

sends RUN_DIR's journal until its "end" event, or until the parent process has exited; URI may be `env:NAME` or `@FILE`.
A process, not a thread: importing mlflow, waiting for a server and its failures then cost the run nothing, and data
loader workers inherit no lock that a thread holds.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from pathlib import Path

from lavic.distributed.background import run_in_background
from lavic.tracking.mlflow_sync import Busy, RunSync, one_line

_POLL_S = 0.5
_BACKOFF_S = (5.0, 60.0)
_EXIT_TIMEOUT_S = 5.0


def follow(run_dir: Path, uri: str, parent_pid: int) -> int:
    """Sends until the journal's "end" event, or until the parent process has exited."""
    logging.getLogger().addHandler(logging.NullHandler())  # messages of libraries may hold a password
    run = RunSync(run_dir, uri)
    run_in_background()
    backoff_s, warned = _BACKOFF_S[0], False
    while True:
        orphaned = os.getppid() != parent_pid
        try:
            run.send()
            if run.files_error and not warned:
                warned = True
                print(f"mlflow: it does not take the run's files ({run.files_error}), only the rest", file=sys.stderr)
            if run.ended:
                return 1 if run.record.files else 0
            if orphaned:
                run.close_if_lost(_EXIT_TIMEOUT_S)
                return 0
            backoff_s = _BACKOFF_S[0]
            time.sleep(_POLL_S)
        except Busy:
            time.sleep(_POLL_S)
        except Exception as error:
            if not warned:
                warned = True
                command = f"lavic sync {shlex.quote(str(run_dir))}"
                print(f"mlflow: {one_line(error)}; the run continues, `{command}` sends it later", file=sys.stderr)
            if orphaned:
                return 1
            deadline = time.monotonic() + backoff_s
            while time.monotonic() < deadline and os.getppid() == parent_pid:
                time.sleep(_POLL_S)
            backoff_s = min(2 * backoff_s, _BACKOFF_S[1])


if __name__ == "__main__":
    raise SystemExit(follow(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
