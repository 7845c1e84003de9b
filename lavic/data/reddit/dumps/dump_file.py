"""The bytes of a dump, in pieces of complete lines.

Dumps are frames of zstd with windows of up to 2 GiB, one or several in a file. Files that are not compressed, or
otherwise, are read too; the content decides.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from lavic.errors import DataError, first_line
from lavic.storage.compression import HEAD, CorruptData, Decompressed, compression_of
from lavic.storage.text_files import MAX_LINE_BYTES, TextFileError, open_text_file

_PIECE = 256 << 10
"""Bytes of a piece, about: it stays in the processor's cache while it is searched."""


def read_pieces(path: str | Path) -> Iterator[bytes]:
    """The content of a dump in pieces that end with a line, the last one maybe without a line end.

    Args:
        path: A path, or a URI that fsspec knows.

    Raises:
        DataError: The file is missing, truncated or corrupt, or a line has more than `MAX_LINE_BYTES`.
    """
    with _open(path) as file:
        buffer = bytearray(2 * _PIECE)
        held = 0
        while count := _read_into(file, buffer, held):
            end = buffer.rfind(b"\n", held, held + count) + 1
            held += count
            if end:
                yield bytes(memoryview(buffer)[:end])
                buffer[: held - end] = buffer[end:held]
                held -= end
            elif held > MAX_LINE_BYTES:
                raise DataError(f"{path}: a line of more than {MAX_LINE_BYTES >> 20} MiB; is this a dump of Reddit?")
            if len(buffer) - held < _PIECE:
                buffer.extend(bytes(len(buffer)))
        if held:
            yield bytes(memoryview(buffer)[:held])


def _read_into(file: BinaryIO, buffer: bytearray, start: int) -> int:
    """Reads into a buffer from a place on; returns how many bytes, 0 at the end."""
    with memoryview(buffer) as view:
        return cast(io.RawIOBase, file).readinto(view[start : start + _PIECE]) or 0


@contextmanager
def _open(path: str | Path) -> Iterator[BinaryIO]:
    """A dump's bytes. Local zstd files skip the layers that other texts need."""
    if not (isinstance(path, str) and "://" in path):
        try:
            with Path(path).open("rb") as file:
                kind = compression_of(file.read(HEAD))
                if kind == "zstd":
                    file.seek(0)
                    stream = Decompressed(file, kind)
                    yield cast(BinaryIO, stream)
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
        yield cast(BinaryIO, text)
        if text.trailing:
            raise TextFileError(path, 0, "bytes after the end of the compressed data; download the file again")
