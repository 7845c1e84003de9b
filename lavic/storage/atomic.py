"""Files that are whole or not there: written aside, flushed to the disk, then renamed."""

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
"""Ending of a file still being written; its name starts with a dot, so that no reader's glob takes it."""


@contextmanager
def written_aside(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of `path` when the block ends well, and vanishes when it does not.

    Two writers of one path never mix: each has its own file, the last to finish wins. In an object store the whole is
    uploaded at the end: an object is there with all its bytes or not at all.

    Args:
        path: The file.
        durable: Whether to flush it to the disk; not worth its time for many small files that are easily made again.
    """
    if is_remote(path):
        with _uploaded(path) as upload:
            yield upload
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


@contextmanager
def _uploaded(path: Path) -> Iterator[BinaryIO]:
    with tempfile.NamedTemporaryFile(suffix=PART) as file:
        yield cast(BinaryIO, file)
        file.flush()
        store = cast(Any, path)
        store.fs.put_file(file.name, store.path)


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a small file at once; text as UTF-8."""
    with written_aside(path) as file:
        file.write(encoded(data) if isinstance(data, str) else data)


def encoded(text: str) -> bytes:
    """Text as UTF-8.

    Half of a surrogate pair, by which Python keeps a byte of a path that is not UTF-8, becomes `\\udcNN`: in JSON that
    is the same character again.
    """
    return text.encode("utf-8", "backslashreplace")


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left behind; only when nobody writes to the folder.

    A folder that was moved away and has no successor, since its writer died between the two renames, is put back.
    In an object store there is nothing to remove.
    """
    if is_remote(folder):
        return
    for old in folder.glob(f".*.old{PART}"):
        home = folder / old.name[1:].rsplit(".", 3)[0]
        if not home.exists():
            old.replace(home)
    for part in folder.glob(f".*{PART}"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Open an empty folder that takes the place of `path` when the block ends well, and vanishes when it does not.

    Its files get the modes that the user's umask gives; some libraries write files that only their owner can read. An
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
            shutil.rmtree(old)
        else:
            part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
