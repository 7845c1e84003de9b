"""A command that kills itself at its n-th change of a folder, or counts them.

self_killing_command.py FOLDER N COUNT-FILE ARGUMENTS...

Moments between two changes leave the same files behind, so these are all that differ. What a library writes from C or
Rust is not seen; the rename that puts it in place is.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def main(folder: str, moment: int, count_file: str, words: list[str]) -> None:
    """Run `lavic WORDS`; `moment` 0 kills nothing."""
    made = 0

    def look(event: str, details: tuple[Any, ...]) -> None:
        nonlocal made
        if event == "open":
            writes = isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes:
                return
        elif event not in CHANGES:
            return
        path = details[0]
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        # As it is spelled: to resolve links would ask the file system, and be looked at again.
        if not os.path.abspath(os.fsdecode(path)).startswith(folder + os.sep):  # noqa: PTH100
            return
        made += 1
        if made == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    from lavic import cli

    sys.argv = ["lavic", *words]
    sys.addaudithook(look)
    code = cli.main()
    with open(count_file, "w") as file:  # noqa: PTH123 (pathlib would do; the fewer imports the better)
        file.write(str(made))
    cli.exit_process(code)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
