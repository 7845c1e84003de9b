"""Local copies of shards that stand in an object store.

fsspec's file cache writes a file in place while it arrives and knows it by its address. Here a copy is known by the
sha256 that the manifest gives, and put in place whole: processes may share the folder, and a repacked shard is another
file.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lavic.errors import DataError, first_line
from lavic.storage.atomic import atomic_open
from lavic.storage.paths import is_remote, storage_errors


def cache_folder() -> Path:
    """LAVIC_CACHE, or `lavic` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LAVIC_CACHE") or Path(home) / "lavic")


def local_copy(path: Path, sha256: str, bytes: int) -> Path:
    """A file of this machine with what stands at `path`: that itself, or a copy that is fetched once.

    Args:
        path: A place that is not written to any more.
        sha256: Its digest, by which the copy is known.
        bytes: Its size.

    Raises:
        DataError: It cannot be read, or is not of that size.
    """
    if not is_remote(path):
        return path
    copy = cache_folder() / "shards" / f"{sha256}{path.suffix}"
    if copy.is_file() and copy.stat().st_size == bytes:
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("rb") as source, atomic_open(copy) as file:
            shutil.copyfileobj(source, file, 8 << 20)
            if file.tell() != bytes:
                raise DataError(f"{path} has {file.tell()} bytes, not {bytes}; `lavic verify` lists every difference")
    except storage_errors() as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from None
    return copy
