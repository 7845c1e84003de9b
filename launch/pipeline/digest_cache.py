"""OUT/.digests.json: a cache of values computed from files, so that a pipeline's status need not read large files."""

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
    """Values computed from files; valid while a file keeps its size and modification time."""

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

    def cached(self, file: Path, key: str, compute: Callable[[], Any]) -> Any:
        """The value of `compute` for a file, from the cache if the file has not changed; JSON can represent it.

        `key` names the value, with everything that it depends on besides the file.

        Raises:
            OSError: The file does not exist.
        """
        stat = file.stat()
        full_key = f"{file}\n{key}" if key else str(file)
        entry = self._entries.get(full_key)
        if not entry or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
            entry = [stat.st_size, stat.st_mtime_ns, compute()]
            self._entries[full_key], self._changed = entry, True
        return entry[2]

    def save(self) -> None:
        """Writes the cache if it has changed and this user may write here."""
        if self._changed:
            with contextlib.suppress(OSError):
                atomic_write(self._path, json.dumps(self._entries) + "\n")
