"""Two ranks, of which the second does not come: a program for the tests of the roll call."""

from __future__ import annotations

import os
import signal
import sys
import time

from lavic.errors import LavicError
from lavic.train.rollcall import RollCall
from lavic.world import World


def main(how: str) -> int:
    world = World.from_env()
    world.start(timeout_s=6)
    try:
        with RollCall(world, patience_s=1.0, beat_s=0.3) as roll:
            for step in (1, 2, 3):
                roll.at(f"the samples of step {step}")
                if world.rank == 1 and step == 3:
                    if how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if how == "failed":
                        raise LavicError("shard 7 cannot be read")
                    time.sleep(60)
                roll.at(f"step {step}")
                world.barrier()
    except LavicError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        os._exit(e.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
