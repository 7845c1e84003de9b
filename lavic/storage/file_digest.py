"""Digests of files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 20


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex. Raises OSError."""
    with path.open("rb") as file:
        return stream_sha256(file)


def stream_sha256(file: BinaryIO) -> str:
    """The sha256 of an open file from its position to its end, in hex. Raises OSError."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
