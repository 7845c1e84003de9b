"""Feeds MLflow while a run goes on, in a process of its own.

    python -m lavic.tracking.live_sync RUN_DIR URI PARENT

follows RUN_DIR's journal until its "end" event, or until the process that started this one is gone; URI may be
`env:NAME` or `@FILE`. A process and not a thread: importing mlflow, waiting for a server and breaking then cost the run
nothing, and the workers that a data loader forks inherit no lock that a thread holds.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from pathlib import Path

from lavic.tracking.mlflow_sync import Busy, Feed, one_line
from lavic.tracking.system_metrics import stay_calm

_POLL_S = 0.5
_BACKOFF_S = (5.0, 60.0)
_DYING_S = 5.0


def follow(run_dir: Path, uri: str, parent: int) -> int:
    """Feeds until the journal's "end" event, or until the process that started this one, `parent`, is gone."""
    logging.getLogger().addHandler(logging.NullHandler())  # what libraries say may hold a password
    feed = Feed(run_dir, uri)
    stay_calm()
    wait, told = _BACKOFF_S[0], False
    while True:
        orphan = os.getppid() != parent
        try:
            feed.pump()
            if feed.ended:
                return 0
            if orphan:
                feed.settle(_DYING_S)
                return 0
            wait = _BACKOFF_S[0]
            time.sleep(_POLL_S)
        except Busy:
            time.sleep(_POLL_S)
        except Exception as error:
            if not told:
                told = True
                later = f"`lavic sync {shlex.quote(str(run_dir))}` sends it later"
                print(f"mlflow: {one_line(error)}; the run goes on, {later}", file=sys.stderr)
            if orphan:
                return 1
            _sleep_until_orphan(wait, parent)
            wait = min(2 * wait, _BACKOFF_S[1])


def _sleep_until_orphan(seconds: float, parent: int) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and os.getppid() == parent:
        time.sleep(_POLL_S)


if __name__ == "__main__":
    raise SystemExit(follow(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
