"""Two ranks, of which the second does not come: a program for the tests of the hang watchdog."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from lavic.distributed.context import DistributedContext
from lavic.distributed.hang_watchdog import HangWatchdog
from lavic.errors import LavicError


def wait_as_nccl_does() -> None:
    """No error ever comes, and no signal handler runs."""
    time.sleep(600)


def main(how: str, records: Path | None) -> int:
    world = DistributedContext.from_env()
    world.init_process_group(timeout_s=6)
    try:
        with HangWatchdog(world, warn_after_s=1.0, heartbeat_s=0.3, grace_s=0.5, flight_recorder=records) as watchdog:
            for step in (1, 2, 3):
                watchdog.mark(f"the samples of step {step}")
                if world.rank == 1 and step == 3 and how != "main-killed":
                    if how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if how in ("failed", "unnoticed"):
                        raise LavicError("shard 7 cannot be read")
                    time.sleep(60)
                if world.is_main and step == 3 and how == "main-killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                watchdog.mark(f"step {step}")
                if how in ("unnoticed", "main-killed") and step == 3:
                    wait_as_nccl_does()
                world.barrier()
    except LavicError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        os._exit(e.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]) if sys.argv[2:] else None))
