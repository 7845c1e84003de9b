"""Atomic writes: a file is complete or missing. It is written under another name, flushed to disk, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from lavic.storage.paths import is_remote

PART = ".part"
"""Suffix of a file that is being written; its name starts with a dot, so that no glob matches it."""


@contextmanager
def atomic_open(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Opens a binary file that replaces `path` when the block succeeds, and is removed when it raises.

    Each writer of a path has its own file; the last to finish wins. In an object store the file is uploaded at the end.
    One that is not `durable` is not synced to disk, which is too slow for many small files that are easily made again.
    """
    if is_remote(path):
        with tempfile.NamedTemporaryFile(suffix=PART) as upload:
            yield cast(BinaryIO, upload)
            upload.flush()
            store = cast(Any, path)
            store.fs.put_file(upload.name, store.path)
        return
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a small file; text as UTF-8."""
    with atomic_open(path) as file:
        file.write(to_utf8(data) if isinstance(data, str) else data)


def to_utf8(text: str) -> bytes:
    """Text as UTF-8.

    A lone surrogate, by which Python represents a byte of a path that is not UTF-8, becomes `\\udcNN`, which JSON reads
    as the same character.
    """
    return text.encode("utf-8", "backslashreplace")


def remove_partial_files(folder: Path) -> None:
    """Removes partial files of killed writers; only while nobody writes to the folder.

    An old folder whose writer was killed between the two renames of `atomic_folder` is restored. In an object store
    there is nothing to remove.
    """
    if is_remote(folder):
        return
    for old in folder.glob(f".*.old{PART}"):
        target = folder / old.name[1:].rsplit(".", 3)[0]
        if not target.exists():
            old.replace(target)
    for part in folder.glob(f".*{PART}"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Opens an empty folder that replaces `path` when the block succeeds, and is removed when it raises.

    Its files get the modes of the user's umask, since some libraries write files that only their owner can read. An
    older `path` is moved away first and removed last, so that a crash leaves the old folder or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    part.mkdir()
    try:
        yield part
        # mkdir has applied the umask, which cannot be read without changing it for other threads.
        mode = part.stat().st_mode & 0o666
        for file in part.rglob("*"):
            if file.is_file():
                file.chmod(mode)
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        if path.exists():
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old{PART}")
            path.replace(old)
            part.replace(path)
            # Under another name: what cannot be removed now (an open file on NFS) must never be restored.
            old.replace(part)
        else:
            part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
