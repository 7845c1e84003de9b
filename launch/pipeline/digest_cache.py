"""OUT/.digests.json: what was found out about files, so that large ones are not read at each look at a pipeline."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavic.storage.atomic import atomic_write
from lavic.train.run_folder import digest_files

FILE = ".digests.json"


class Digests:
    """What was found out about files; one that has the size and time of change that it had then is not read again."""

    def __init__(self, out: Path) -> None:
        self._path = out / FILE
        self._new = False
        try:
            self._known: dict[str, list[Any]] = dict(json.loads(self._path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            self._known = {}

    def of(self, file: Path) -> str:
        """The digest of a file's content; "" where it cannot be read."""
        try:
            return str(self.about(file, "", lambda: digest_files([file])))
        except OSError:
            return ""

    def about(self, file: Path, what: str, compute: Callable[[], Any]) -> Any:
        """What `compute` says, or said when the file was as it is now.

        Args:
            file: The file.
            what: Names the question, with all else that the answer depends on.
            compute: Gives the answer, as JSON can hold it.

        Raises:
            OSError: The file is not there.
        """
        stat = file.stat()
        key = f"{file}\n{what}" if what else str(file)
        before = self._known.get(key)
        if not before or before[:2] != [stat.st_size, stat.st_mtime_ns]:
            before = [stat.st_size, stat.st_mtime_ns, compute()]
            self._known[key], self._new = before, True
        return before[2]

    def save(self) -> None:
        """Keeps them for the next time, where this user may write."""
        if self._new:
            with contextlib.suppress(OSError):
                atomic_write(self._path, json.dumps(self._known) + "\n")
