"""The reader of text files that users have written by hand or exported from other programs.

A byte order mark, UTF-16, Windows line ends and compression are detected by content, not by the file's name. Errors
name the file and the line.
"""

from __future__ import annotations

import codecs
import io
import logging
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from lavic.errors import DataError, first_line
from lavic.storage.compression import HEAD, BlockStream, CorruptData, Decompressed, compression_of
from lavic.storage.paths import options, storage_errors

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 64 << 20
"""Bytes of the longest line that is read."""

_CHUNK = 1 << 20
_SAMPLE = 4096
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks; that of UTF-32-LE starts with that of UTF-16-LE."""


class TextFileError(DataError):
    """A text file, or a line of it, that cannot be read."""

    def __init__(self, file: str | Path, line: int, reason: str) -> None:
        """`line` counts from 1; 0 stands for the whole file."""
        super().__init__(f"{file}:{line}: {reason}" if line else f"{file}: {reason}")
        self.file, self.line, self.reason = str(file), line, reason


class TextFile(io.BufferedReader):
    """A text file as a binary stream of UTF-8 without a byte order mark."""

    def __init__(self, file: BinaryIO, path: str | Path) -> None:
        """Detects compression and encoding; `path` is for messages. Raises TextFileError for a zip archive."""
        self._unpacked: Decompressed | None = None
        head, file = read_head(file, HEAD)
        if kind := compression_of(head):
            if kind == "zip":
                raise TextFileError(path, 0, "a zip archive; unpack it first")
            self._unpacked = Decompressed(file, kind)
            file = io.BufferedReader(self._unpacked, _CHUNK)
        head, file = read_head(file, _SAMPLE)
        encoding, mark = detect_encoding(head)
        file.read(mark)
        raw = _Prefixed(file) if encoding == "utf-8" else _Recoded(file, encoding)
        super().__init__(raw, _CHUNK)

    @property
    def trailing(self) -> int:
        """Bytes after the end of the compressed data; known once the file was read to its end."""
        return self._unpacked.trailing if self._unpacked else 0


@contextmanager
def open_text_file(path: str | Path) -> Iterator[TextFile]:
    """Opens a path, or a URI that fsspec knows (`s3://...`), for reading.

    Raises:
        TextFileError: It cannot be opened or read; also raised from reads within the block.
    """
    with open_bytes(path) as file, TextFile(file, path) as text:
        yield text
        if text.trailing:
            log.warning("%s: ignored %d bytes after the end of the compressed data", path, text.trailing)


@contextmanager
def open_bytes(path: str | Path) -> Iterator[BinaryIO]:
    """A file's bytes as they are stored; arguments and errors as for `open_text_file`."""
    try:
        if isinstance(path, str) and "://" in path:
            import fsspec

            try:
                opened = fsspec.open(path, "rb", **options(path))
            except ValueError as error:
                raise TextFileError(path, 0, f"cannot be opened ({first_line(error)})") from None
            with opened as file:
                yield file
        else:
            with Path(path).open("rb") if isinstance(path, str) else path.open("rb") as file:
                yield file
    except FileNotFoundError:
        raise TextFileError(path, 0, "no such file") from None
    except CorruptData as error:
        raise TextFileError(
            path, 0, f"the compressed data is corrupt ({first_line(error)}); download or copy the file again"
        ) from None
    except storage_errors(ImportError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise TextFileError(path, 0, f"cannot be read ({reason})") from None


def read_text(path: str | Path) -> str:
    """A file's text, with line ends as `\\n`. Raises TextFileError where it cannot be read, or is not text."""
    with open_text_file(path) as file:
        return _decoded(file.read(), path, 0)


def decode_text(data: bytes, name: str) -> str:
    """The text of bytes that were read already, such as standard input; as `read_text`."""
    return _decoded(TextFile(io.BytesIO(data), name).read(), name, 0)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of every line, without its line end; holds one line at a time.

    Raises:
        TextFileError: The file cannot be read, or a line is not text or too long.
    """
    number = 0
    with open_text_file(path) as file:
        for _, line in raw_lines(file):
            if line is None:
                raise TextFileError(path, number + 1, f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
            # More than one where lines end in a lone carriage return.
            for text in _decoded(line, path, number + 1).removesuffix("\n").split("\n"):
                number += 1
                yield number, text.removeprefix("\ufeff")  # of files that were concatenated


def raw_lines(file: BinaryIO, longest: int = MAX_LINE_BYTES) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of every line, with its line end; None for a line that is longer than `longest`."""
    number = 0
    while line := file.readline(longest):
        number += 1
        if len(line) < longest or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(longest)
        yield number, None


def detect_encoding(head: bytes) -> tuple[str, int]:
    """The encoding of a text that starts with these bytes, and the length of its byte order mark.

    Without a mark, UTF-16 is assumed only where it is certain: the text starts with two ASCII characters and has no NUL
    character.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    for encoding, upper in (("utf-16-le", 1), ("utf-16-be", 0)):
        high, low = head[upper : len(head) & ~1 : 2], head[1 - upper : len(head) & ~1 : 2]
        if len(high) < 2 or any(high[:2]) or not low[:2].isascii():
            continue
        # NULs may stand between other bytes too; at least a quarter of exported text is ASCII.
        if high.count(0) * 4 >= len(high) and all(map(operator.or_, high, low)):
            return encoding, 0
    return "utf-8", 0


class _Prefixed(io.RawIOBase):
    """A file's bytes, after those that were read already."""

    def __init__(self, file: BinaryIO, head: bytes = b"") -> None:
        self._file, self._head = file, head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._head:
            return cast(io.BufferedReader, self._file).readinto(buffer)
        count = min(len(buffer), len(self._head))
        buffer[:count] = self._head[:count]
        self._head = self._head[count:]
        return count


class _Recoded(BlockStream):
    """A file's text as UTF-8. Undecodable input becomes a byte that is not UTF-8, so that its line can be named."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._ended = False

    def read_block(self) -> bytes:
        block = b""
        while not block and not self._ended:
            data = self._file.read(_CHUNK)
            self._ended = not data
            try:
                block = self._decoder.decode(data, final=self._ended).encode("utf-8", "surrogatepass")
            except UnicodeDecodeError:
                block, self._ended = b"\xff", True
        return block


def read_head(file: BinaryIO, count: int) -> tuple[bytes, BinaryIO]:
    """A file's first bytes, and a file that starts with them again."""
    head = file.read(count)
    return head, cast(BinaryIO, io.BufferedReader(_Prefixed(file, head), _CHUNK))


def _decoded(data: bytes, path: str | Path, line: int) -> str:
    """UTF-8 as text; `line` is the number of its first line, 0 where `data` is the complete file."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        number = line or data.count(b"\n", 0, error.start) + 1
        wrong = data[error.start : error.start + 1].hex()
        raise TextFileError(path, number, f"not UTF-8 (byte 0x{wrong}); save the file as UTF-8") from None
    if (position := text.find("\0")) >= 0:
        number = line or text.count("\n", 0, position) + 1
        raise TextFileError(path, number, "a NUL byte, so this is not a text file")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
