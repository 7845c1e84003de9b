"""Indexes are made once on a node, from sources that say by their digest whether an index is theirs.

The writer of the sources leaves the index beside them. Where it is missing or stale, the first process
that needs it makes it in the user's cache folder, and the others wait for it.
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
ENDING = ".safetensors"
_PATIENCE_S = 24 * 3600.0
_DAY_S = 24 * 3600.0
_KEPT_S = 30 * _DAY_S
"""How long an index stays in the cache that nobody opens."""

log = logging.getLogger(__name__)

Build = Callable[[ArrayWriter], None]
"""Adds an index's columns to a writer."""


def index_name(kind: str, source: str) -> str:
    """File name of an index beside its sources."""
    return f"{kind.partition('/')[0]}-{source[:16]}{ENDING}"


def write_index(path: Path, build: Build, *, kind: str, source: str) -> None:
    """Makes an index and puts it in place whole.

    Args:
        path: The file.
        build: Adds the columns.
        kind: What it is an index of, with the version of its columns: `items/1`.
        source: Digest of what it is made from.

    Raises:
        OSError: It cannot be written.
    """
    with ArrayWriter(path.parent) as writer:
        build(writer)
        # it is easily made again, and its length shows whether it is whole
        with atomic_open(path, durable=False) as file:
            writer.put_together(file, {"kind": kind, "source": source})


def shared_index(build: Build, *, kind: str, source: str, owner: str | Path, beside: Path | None = None) -> ArrayFile:
    """Opens the index of some sources; the first process of a node that wants it makes it.

    Args:
        build: Adds the columns.
        kind: What it is an index of, with the version of its columns: `items/1`.
        source: Digest of what it is made from.
        owner: Where the sources stand, for messages; indexes of what stood there before are removed.
        beside: Folder of the sources, where their writer may have left the index.

    Raises:
        ConfigError: There is no place to make it in.
        LavicError: The sources cannot be read, or the disk is full.
    """
    if beside is not None and (index := _opened(beside / index_name(kind, source), kind, source)):
        return index
    return shared_file(
        lambda path: write_index(path, build, kind=kind, source=source),
        lambda path: _opened(path, kind, source),
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
    ending: str = ENDING,
) -> T:
    """Opens a file of the cache folder; the first process of a node that wants it writes it.

    Args:
        write: Puts it in place whole.
        read: Opens it; None where it is not there or not what it should be.
        kind: As for `shared_index`.
        source: As for `shared_index`.
        owner: As for `shared_index`.
        ending: Of its name.

    Raises:
        ConfigError: There is no place to write it to.
        LavicError: What it is made from cannot be read, or the disk is full.
    """
    folder = _folder()
    place = hashlib.sha256(str(owner).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    path = folder / f"{kind.partition('/')[0]}-{place}-{source[:16]}{ending}"
    if (file := read(path)) is not None:
        return file
    try:
        with FileLock(folder / f".{path.name}.lock") as lock:
            held = lock.acquire()
            if not held:
                log.info("%s: waiting for another process, which makes %s", owner, path)
                held = lock.acquire(_PATIENCE_S)
            try:
                if (file := read(path)) is None:  # else another process has made it meanwhile
                    started = time.monotonic()
                    _make_room(folder, path)
                    write(path)
                    log.info("%s: made %s in %.1f s", owner, path, time.monotonic() - started)
                    file = read(path)
            finally:
                if held and not lock.unsupported:
                    lock.remove()
    except OSError as error:
        raise not_writable(folder, error) from None
    if file is None:
        raise LavicError(f"{path}: what was written cannot be read; run the command again")
    return file


def _opened(path: Path, kind: str, source: str) -> ArrayFile | None:
    """An index that is there and fits."""
    try:
        index = ArrayFile(path, kind=kind, source=source)
    except FileNotFoundError:
        return None
    except (ArrayFileError, OSError) as error:
        log.warning("%s; the index is made anew in the cache folder", error)
        return None
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _DAY_S:
            os.utime(path)
    return index


def _folder() -> Path:
    """Where indexes are made: the cache folder, or the folder for temporary files where that cannot be written to.

    Raises:
        ConfigError: Neither can be written to.
    """
    cache: Path | None = None
    with suppress(OSError, RuntimeError):  # RuntimeError: the user has no home folder
        cache = cache_folder() / "indexes"
        cache.mkdir(parents=True, exist_ok=True)
        check_writable(cache)
        return cache
    temporary = Path(tempfile.gettempdir()) / f"lavic-{os.getuid()}"
    with suppress(OSError):
        temporary.mkdir(mode=0o700, exist_ok=True)
        if temporary.lstat().st_uid == os.getuid():  # anybody may have made it
            check_writable(temporary)
            return temporary
    raise ConfigError(
        f"{cache or temporary}: cannot be written to: set LAVIC_CACHE to a folder for the indexes of large sets"
    )


def _make_room(folder: Path, path: Path) -> None:
    """Removes what a killed process left of an index, and indexes that nobody needs any more.

    Those of earlier sources of the same place go after a day: a process may still be about to open them.
    """
    for part in folder.glob(f".{path.name}.*{PART}"):
        part.unlink(missing_ok=True)
    same_place = path.stem[:-16]
    for other in folder.glob("[!.]*-*-*.*"):
        with suppress(OSError):
            unused = time.time() - other.stat().st_mtime
            if unused > (_DAY_S if other.name.startswith(same_place) else _KEPT_S):
                other.unlink()
