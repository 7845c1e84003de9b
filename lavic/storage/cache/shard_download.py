"""One download of a shard from an object store, held against what the manifest says of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lavic.errors import DataError, LavicError, first_line
from lavic.storage.paths import place

CHUNK = 8 << 20
"""Bytes that are read from the store at once."""


@dataclass(frozen=True, kw_only=True)
class RemoteShard:
    """A shard in an object store that is not written to any more."""

    folder: Path
    name: str
    sha256: str
    bytes: int

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder / self.name


def copy_shard(shard: RemoteShard, file: int) -> str:
    """Copy a shard into an open file; returns what is wrong with what came, or nothing.

    Raises:
        DataError: There is no such shard, or it must not be read.
        OSError: The file cannot be written to.
    """
    digest, size = hashlib.sha256(), 0
    try:
        for chunk in _chunks(shard.path):
            digest.update(chunk)
            view = memoryview(chunk)
            while view:
                written = os.pwrite(file, view, size)
                size, view = size + written, view[written:]
            if size > shard.bytes:
                break
    except _Broken as error:
        return str(error)
    if size != shard.bytes:
        stored = shard.bytes
        with suppress(Exception):  # as above
            stored = place(str(shard.path)).stat().st_size
        if stored != shard.bytes:
            raise DataError(
                f"{shard.path} has {stored} bytes, not {shard.bytes}; `lavic verify` lists every difference"
            )
        return f"came with {size:,} of {shard.bytes:,} bytes"
    if digest.hexdigest() != shard.sha256:
        return "is not the file that the manifest names (its sha256 differs)"
    return ""


def read_range(shard: RemoteShard, start: int, end: int) -> bytes:
    """Bytes of a shard, from `start` up to `end`, straight from the store: nothing says that they are the right ones.

    Raises:
        DataError: There is no such shard, or it must not be read.
        LavicError: The store does not answer.
    """
    store = cast(Any, place(str(shard.path)))
    try:
        return bytes(store.fs.cat_file(store.path, start=start, end=end))
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{shard.path}: cannot be read ({first_line(error)})") from None
    except Exception as error:  # each store's client has errors of its own
        raise LavicError(f"{shard.path}: cannot be read ({first_line(error)}): is the store reachable?") from None


def _chunks(path: Path) -> Iterator[bytes]:
    """A remote file's bytes. Raises DataError where trying again is of no use, and `_Broken` where it may be."""
    try:
        # a store's client does not survive a fork: this process makes its own
        with place(str(path)).open("rb") as source:
            while chunk := source.read(CHUNK):
                yield chunk
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(
            f"{path}: cannot be read ({first_line(error)}); `lavic verify` lists every difference"
        ) from None
    except Exception as error:  # each store's client has errors of its own
        raise _Broken(f"cannot be read ({first_line(error)})") from None


class _Broken(Exception):
    """The store did not give a file to its end."""
