"""Downloads a shard from an object store and compares it with the manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lavic.errors import DataError, LavicError, first_line
from lavic.storage.paths import as_path

CHUNK = 8 << 20
"""Bytes per read from the store."""


@dataclass(frozen=True, kw_only=True)
class RemoteShard:
    """A complete shard in an object store."""

    folder: Path
    name: str
    sha256: str
    bytes: int

    @property
    def path(self) -> Path:
        """Its path in the store."""
        return self.folder / self.name


def copy_shard(shard: RemoteShard, file: int) -> str:
    """Copies a shard into an open file; returns what went wrong, if another attempt may succeed, or "".

    Raises:
        DataError: The shard is missing, has another size, or must not be read.
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
    except _DownloadError as error:
        return str(error)
    if size != shard.bytes:
        stored = shard.bytes
        with suppress(Exception):  # the clients of the stores have various exceptions
            stored = as_path(str(shard.path)).stat().st_size
        if stored != shard.bytes:
            raise DataError(
                f"{shard.path} has {stored} bytes, not {shard.bytes}; `lavic verify` lists every difference"
            )
        return f"received {size:,} of {shard.bytes:,} bytes"
    if digest.hexdigest() != shard.sha256:
        return "its sha256 differs from the manifest's"
    return ""


def read_range(shard: RemoteShard, start: int, end: int) -> bytes:
    """Bytes of a shard, from `start` up to `end`, read from the store without a check of the digest.

    Raises:
        DataError: The shard is missing, or must not be read.
        LavicError: The store does not respond.
    """
    store = cast(Any, as_path(str(shard.path)))
    try:
        return bytes(store.fs.cat_file(store.path, start=start, end=end))
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{shard.path}: cannot be read ({first_line(error)})") from None
    except Exception as error:  # the clients of the stores have various exceptions
        raise LavicError(f"{shard.path}: cannot be read ({first_line(error)}): is the store reachable?") from None


def _chunks(path: Path) -> Iterator[bytes]:
    """A remote file's bytes. Raises `_DownloadError` if another attempt may succeed, else DataError."""
    try:
        # The client of a store does not survive a fork: this process makes a new one.
        with as_path(str(path)).open("rb") as source:
            while chunk := source.read(CHUNK):
                yield chunk
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(
            f"{path}: cannot be read ({first_line(error)}); `lavic verify` lists every difference"
        ) from None
    except Exception as error:  # the clients of the stores have various exceptions
        raise _DownloadError(f"cannot be read ({first_line(error)})") from None


class _DownloadError(Exception):
    """A download failed midway."""
