"""A rank that runs several `lavic` commands, each in a forked process: a launcher is started once for all of them.

    LAUNCHER ... --module tests.launch.run_commands FILE    FILE is a JSON list of argument lists

A forked process has the environment of its rank and everything imported. It ends with its command, as a rank does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from lavic.cli import entry
from tests.forked_program import preload


def main(file: Path) -> int:
    """Runs the commands up to the first that fails; returns its exit code."""
    preload()
    for number, argv in enumerate(json.loads(file.read_text())):
        pid = os.fork()
        if pid == 0:
            if number:  # the launcher's store is for one process group: rank 0 opens another one
                os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
                os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + number)
            sys.argv = ["lavic", *argv]
            entry()
        if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
