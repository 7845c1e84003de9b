"""Indexes that the processes of a node share. An index carries the digest of its sources.

The writer of the sources may leave the index beside them. If it is missing or stale, the first process that needs it
builds it in the user's cache folder, and the others wait.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from lavic.errors import ConfigError, LavicError
from lavic.storage.atomic import PART, atomic_open
from lavic.storage.cache.shard_cache import cache_folder
from lavic.storage.file_lock import FileLock
from lavic.storage.index.array_file import ArrayFile, ArrayFileError, ArrayWriter
from lavic.storage.output_folder import check_writable, not_writable

T = TypeVar("T")
SUFFIX = ".safetensors"
_DAY_S = 24 * 3600.0
_MAX_UNUSED_S = 30 * _DAY_S
"""An index that no process opens for this time is removed from the cache."""

log = logging.getLogger(__name__)

Build = Callable[[ArrayWriter], None]
"""Adds an index's columns to a writer."""


def index_name(kind: str, source: str) -> str:
    """File name of an index beside its sources."""
    return f"{kind.partition('/')[0]}-{source[:16]}{SUFFIX}"


def write_index(path: Path, build: Build, *, kind: str, source: str) -> None:
    """Builds an index, atomically. Raises OSError where it cannot be written."""
    with ArrayWriter(path.parent) as writer:
        build(writer)
        # No fsync: it is easily built again, and its length shows whether it is complete.
        with atomic_open(path, durable=False) as file:
            writer.put_together(file, {"kind": kind, "source": source})


def shared_index(build: Build, *, kind: str, source: str, owner: str | Path, beside: Path | None = None) -> ArrayFile:
    """Opens the index of some sources; the first process of a node that needs it builds it.

    Args:
        build: Adds the columns.
        kind: What it is an index of, with the version of its columns: `items/1`.
        source: Digest of the sources.
        owner: Path of the sources, for messages; older indexes of the same path are removed.
        beside: Folder of the sources, where their writer may have left the index.

    Raises:
        ConfigError: No folder is writable.
        LavicError: The sources cannot be read, or the disk is full.
    """
    if beside is not None and (index := _open(beside / index_name(kind, source), kind, source)):
        return index
    return shared_file(
        lambda path: write_index(path, build, kind=kind, source=source),
        lambda path: _open(path, kind, source),
        kind=kind,
        source=source,
        owner=owner,
    )


def shared_file(
    write: Callable[[Path], None],
    read: Callable[[Path], T | None],
    *,
    kind: str,
    source: str,
    owner: str | Path,
    suffix: str = SUFFIX,
) -> T:
    """Opens a file of the cache folder; the first process of a node that needs it writes it. As `shared_index`.

    `write` writes it, atomically; `read` opens it, and returns None where it is missing or invalid.
    """
    folder = _writable_folder()
    owner_digest = hashlib.sha256(str(owner).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    path = folder / f"{kind.partition('/')[0]}-{owner_digest}-{source[:16]}{suffix}"
    if (file := read(path)) is not None:
        return file
    try:
        with FileLock(folder / f".{path.name}.lock") as lock:
            acquired = lock.acquire()
            if not acquired:
                log.info("%s: waiting for another process that is building %s", owner, path)
                acquired = lock.acquire(_DAY_S)
            try:
                if (file := read(path)) is None:  # another process may have written it during the wait
                    started = time.monotonic()
                    _remove_old(folder, path)
                    write(path)
                    log.info("%s: built %s in %.1f s", owner, path, time.monotonic() - started)
                    file = read(path)
            finally:
                if acquired and not lock.unsupported:
                    lock.remove()
    except OSError as error:
        raise not_writable(folder, error) from None
    if file is None:
        raise LavicError(f"{path}: cannot be read after it was written; run the command again")
    return file


def _open(path: Path, kind: str, source: str) -> ArrayFile | None:
    """An index; None if it is missing or invalid."""
    try:
        index = ArrayFile(path, kind=kind, source=source)
    except FileNotFoundError:
        return None
    except (ArrayFileError, OSError) as error:
        log.warning("%s; building the index again in the cache folder", error)
        return None
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _DAY_S:
            os.utime(path)
    return index


def _writable_folder() -> Path:
    """The cache folder for indexes, or the temporary folder. Raises ConfigError where neither is writable."""
    cache: Path | None = None
    with suppress(OSError, RuntimeError):  # RuntimeError: the user has no home folder
        cache = cache_folder() / "indexes"
        cache.mkdir(parents=True, exist_ok=True)
        check_writable(cache)
        return cache
    temporary = Path(tempfile.gettempdir()) / f"lavic-{os.getuid()}"
    with suppress(OSError):
        temporary.mkdir(mode=0o700, exist_ok=True)
        if temporary.lstat().st_uid == os.getuid():  # another user may have made it
            check_writable(temporary)
            return temporary
    raise ConfigError(
        f"{cache or temporary}: cannot be written to: set LAVIC_CACHE to a folder for the indexes of large sets"
    )


def _remove_old(folder: Path, path: Path) -> None:
    """Removes partial files of a killed process, and old indexes.

    An index of older sources of the same owner is kept for a day: a process may be about to open it.
    """
    for part in folder.glob(f".{path.name}.*{PART}"):
        part.unlink(missing_ok=True)
    same_owner = path.stem[:-16]
    for file in folder.glob("[!.]*-*-*.*"):
        with suppress(OSError):
            unused_s = time.time() - file.stat().st_mtime
            if unused_s > (_DAY_S if file.name.startswith(same_owner) else _MAX_UNUSED_S):
                file.unlink()
