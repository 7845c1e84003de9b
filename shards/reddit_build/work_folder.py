"""OUT/work: the results of the steps, so that the same command resumes where it was ended."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavic.data.catalog import find_files
from lavic.errors import DataError
from lavic.storage.atomic import atomic_write, remove_partial_files
from lavic.storage.paths import as_path, storage_errors

log = logging.getLogger(__name__)

FOLDER = "work"
_PLAN = "plan.digest"


class WorkFolder:
    """The results of the steps."""

    def __init__(self, out: Path, plan: Mapping[str, Any]) -> None:
        """Opens OUT/work; empties it if it was made by another plan, which is all that the set depends on."""
        self.path = out / FOLDER
        self.digest = digest_of(plan)
        written = self.path / _PLAN
        if self.path.exists() and (not written.exists() or written.read_text("utf-8") != self.digest):
            log.info("inputs or settings have changed: all steps run again")
            shutil.rmtree(self.path)
        for step in ("table", "reviews", "scan", "gather", "threads"):
            folder = self.path / step
            folder.mkdir(parents=True, exist_ok=True)
            remove_partial_files(folder)
        atomic_write(written, self.digest)

    def file(self, step: str, name: str) -> Path:
        """A file of a step."""
        return self.path / step / name

    def remove(self) -> None:
        """Removes all of it."""
        shutil.rmtree(self.path, ignore_errors=True)


def digest_of(plan: Mapping[str, Any]) -> str:
    """A name for a plan."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()[:16]


def input_files(patterns: Sequence[str], description: str) -> dict[str, str]:
    """The files that match paths, globs and URIs, sorted, each with a name that changes with its content.

    Raises:
        DataError: There is no such file.
    """
    files: dict[str, str] = {}
    try:
        paths = sorted(find_files(patterns))
    except DataError as error:
        raise DataError(str(error).replace("catalogue file", description)) from None
    for path in paths:
        try:
            status = as_path(path).stat()
            with as_path(path).open("rb") as file:  # before OUT is made, what cannot be read is refused
                file.read(1)
        except storage_errors() as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
        identity = f"{path} {status.st_size} {getattr(status, 'st_mtime_ns', '')}"
        files[path] = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return files
