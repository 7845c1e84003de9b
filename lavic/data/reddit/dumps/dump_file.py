"""The bytes of a dump, in pieces of complete lines.

Dumps are zstd files of one or several frames, with windows of up to 2 GiB. Uncompressed files and other compressions
are detected by content and read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lavic.data.reddit.dumps.post import BadPost, post_from_row, read_object
from lavic.errors import DataError
from lavic.storage.compression import HEAD, CorruptData, Decompressed, compression_of
from lavic.storage.text_files import MAX_LINE_BYTES, TextFile, open_bytes, read_head

_BLOCK = 256 << 10
_CHECKED_LINES = 100
"""Lines from the start of a file, one of which must be a post."""


def read_pieces(path: str | Path) -> Iterator[bytes]:
    """The content of a dump in pieces that end with a line, the last one maybe without a line end.

    `path` may be a URI that fsspec knows. Raises DataError where the file is missing, truncated or corrupt, or a line
    has more than `MAX_LINE_BYTES`.
    """
    with _open(path) as blocks:
        parts: list[bytes | memoryview] = []
        size = 0
        for block in blocks:
            end = block.rfind(b"\n") + 1
            if end:
                yield b"".join((*parts, memoryview(block)[:end]))
                parts, size = [], 0
            parts.append(block[end:])
            size += len(block) - end
            if size > MAX_LINE_BYTES:
                raise DataError(f"{path}: a line of more than {MAX_LINE_BYTES >> 20} MiB; is this a dump of Reddit?")
        if size:
            yield b"".join(parts)


def check_dump(path: str | Path) -> None:
    """Raises DataError if none of the first lines of a file or URI is a post of Reddit."""
    for piece in read_pieces(path):
        if any(map(_is_post, piece.split(b"\n")[:_CHECKED_LINES])):
            return
        raise DataError(
            f"{path}: neither comments nor submissions of Reddit in its first {_CHECKED_LINES} lines; "
            "expected one JSON object per line"
        )
    raise DataError(f"{path}: is empty; download it again, or leave it out")


def _is_post(line: bytes) -> bool:
    try:
        post_from_row(read_object(line))
    except BadPost:
        return False
    return True


@contextmanager
def _open(path: str | Path) -> Iterator[Iterator[bytes]]:
    """A dump's bytes, block by block. Those of zstd files skip the layers that other texts need."""
    with open_bytes(path) as file:
        head, file = read_head(file, HEAD)
        stream: Decompressed | TextFile
        if compression_of(head) == "zstd":
            stream = Decompressed(file, "zstd")
            yield iter(stream.read_block, b"")
        else:
            stream = TextFile(file, path)
            yield iter(partial(stream.read, _BLOCK), b"")
        if stream.trailing:
            raise CorruptData(f"{stream.trailing} bytes after its end")
