"""The bytes of a dump, in pieces of complete lines.

Dumps are frames of zstd with windows of up to 2 GiB, one or several in a file. Files that are not compressed, or
otherwise, are read too; the content decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lavic.errors import DataError, first_line
from lavic.storage.compression import HEAD, CorruptData, Decompressed, compression_of
from lavic.storage.text_files import MAX_LINE_BYTES, TextFileError, open_text_file

_BLOCK = 256 << 10


def read_pieces(path: str | Path) -> Iterator[bytes]:
    """The content of a dump in pieces that end with a line, the last one maybe without a line end.

    Args:
        path: A path, or a URI that fsspec knows.

    Raises:
        DataError: The file is missing, truncated or corrupt, or a line has more than `MAX_LINE_BYTES`.
    """
    with _open(path) as blocks:
        held: list[bytes | memoryview] = []
        size = 0
        for block in blocks:
            end = block.rfind(b"\n") + 1
            if end:
                yield b"".join((*held, memoryview(block)[:end]))
                held, size = [], 0
            held.append(block[end:])
            size += len(block) - end
            if size > MAX_LINE_BYTES:
                raise DataError(f"{path}: a line of more than {MAX_LINE_BYTES >> 20} MiB; is this a dump of Reddit?")
        if size:
            yield b"".join(held)


@contextmanager
def _open(path: str | Path) -> Iterator[Iterator[bytes]]:
    """A dump's bytes, block by block. Local zstd files skip the layers that other texts need."""
    if not (isinstance(path, str) and "://" in path):
        try:
            with Path(path).open("rb") as file:
                kind = compression_of(file.read(HEAD))
                if kind == "zstd":
                    file.seek(0)
                    stream = Decompressed(file, kind)
                    yield iter(stream.read_block, b"")
                    if stream.trailing:
                        raise CorruptData(f"{stream.trailing} bytes after the end of the last frame")
                    return
        except FileNotFoundError:
            raise TextFileError(path, 0, "no such file") from None
        except CorruptData as error:
            raise TextFileError(
                path, 0, f"the compressed data is corrupt ({first_line(error)}); download or copy the file again"
            ) from None
        except OSError as error:
            raise TextFileError(path, 0, f"cannot be read ({error.strerror or first_line(error)})") from None
    with open_text_file(path) as text:
        yield iter(partial(text.read, _BLOCK), b"")
        if text.trailing:
            raise TextFileError(path, 0, "bytes after the end of the compressed data; download the file again")
