"""OUT/.digests.json: facts about files, so that large files are not read each time a pipeline's status is asked."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavic.storage.atomic import atomic_write
from lavic.train.run_folder import digest_files

FILE = ".digests.json"


class DigestCache:
    """Facts about files; valid while a file keeps its size and modification time."""

    def __init__(self, out: Path) -> None:
        self._path = out / FILE
        self._changed = False
        try:
            self._entries: dict[str, list[Any]] = dict(json.loads(self._path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            self._entries = {}

    def digest(self, file: Path) -> str:
        """The digest of a file's content; "" where it cannot be read."""
        try:
            return str(self.cached(file, "", lambda: digest_files([file])))
        except OSError:
            return ""

    def cached(self, file: Path, question: str, answer: Callable[[], Any]) -> Any:
        """What `answer` returns, or returned when the file was as it is now.

        Args:
            file: The file.
            question: Part of the key: what is asked, with all that the answer depends on besides the file.
            answer: Returns something that JSON can hold.

        Raises:
            OSError: The file does not exist.
        """
        stat = file.stat()
        key = f"{file}\n{question}" if question else str(file)
        entry = self._entries.get(key)
        if not entry or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
            entry = [stat.st_size, stat.st_mtime_ns, answer()]
            self._entries[key], self._changed = entry, True
        return entry[2]

    def save(self) -> None:
        """Writes the cache if it has changed and this user may write here."""
        if self._changed:
            with contextlib.suppress(OSError):
                atomic_write(self._path, json.dumps(self._entries) + "\n")
