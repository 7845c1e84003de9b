"""A command that kills itself at its n-th change of a folder, or counts the changes.

self_killing_command.py FOLDER N COUNT-FILE ARGUMENTS...

Between two changes the files are the same, so other moments need no test. Writes of C and Rust libraries are not
counted; the renames that put their files in place are.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def main(folder: str, moment: int, count_file: str, argv: list[str]) -> None:
    """Runs `lavic ARGV` until its change number `moment`; 0 for no kill."""
    changes = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal changes
        if event == "open":
            writes = isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes:
                return
        elif event not in CHANGES:
            return
        path = details[0]
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        # Links are not resolved: that would raise audit events again.
        if not os.path.abspath(os.fsdecode(path)).startswith(folder + os.sep):  # noqa: PTH100
            return
        changes += 1
        if changes == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    from lavic import cli

    sys.argv = ["lavic", *argv]
    sys.addaudithook(hook)
    code = cli.main()
    with open(count_file, "w") as file:  # noqa: PTH123 (few imports)
        file.write(str(changes))
    cli.exit_process(code)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
