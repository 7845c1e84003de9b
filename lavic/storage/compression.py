"""Decompressed streams of gzip, bzip2, xz and zstd files, which are detected by their first bytes."""

from __future__ import annotations

import bz2
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from lavic.errors import first_line

_INPUT = 64 << 10
# Less than 128 KiB: for larger blocks glibc's malloc may ask the kernel for fresh pages each time.
_OUTPUT = 96 << 10
"""Bytes of a block, at most: it stays in the processor's cache while it is searched."""
HEAD = 16
"""Bytes from the start of a file that `compression_of` needs."""


_ENDINGS = (".gz", ".bz2", ".xz", ".zst")


def unpacked_name(path: str | Path) -> str:
    """A file's path without the ending of its compression."""
    text = str(path)
    return next((text[: -len(ending)] for ending in _ENDINGS if text.lower().endswith(ending)), text)


class CorruptData(Exception):
    """Compressed data that is truncated or fails its checksum."""


_GZIP = b"\x1f\x8b\x08"
_XZ = b"\xfd7zXZ\0"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZIP = b"PK\x03\x04"


class BlockStream(io.RawIOBase):
    """A stream of blocks."""

    _unread = b""

    def read_block(self) -> bytes:
        """The next bytes, of any number: no copy is made of them. Empty at the end."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._unread:
            self._unread = self.read_block()
        count = min(len(buffer), len(self._unread))
        buffer[:count] = self._unread[:count]
        self._unread = self._unread[count:]
        return count


class Decompressed(BlockStream):
    """The content of a compressed file: all its members, one after the other.

    Bytes after the last member are not read; `trailing` counts them, without zeros, which are padding. Reading raises
    CorruptData where a member is corrupt or the file is truncated.
    """

    def __init__(self, file: BinaryIO, kind: str) -> None:
        """Reads from the start of `file`; its compression is that of `compression_of`."""
        self._file, self._kind = file, kind
        self._new, self._error = _decoder(kind)
        self._decoder = self._new()
        self._input = b""
        self._ended = False
        self.trailing = 0

    def read_block(self) -> bytes:
        block = b""
        while not block and not self._ended:
            if self._decoder.eof:
                self._next_member()
            else:
                block = self._decompress()
        return block

    def _decompress(self) -> bytes:
        # zlib returns the input that did not fit into the output; bz2 and lzma keep it.
        data = self._input
        if not data and getattr(self._decoder, "needs_input", True):
            data = self._file.read(_INPUT)
            if not data:
                raise CorruptData("the file is truncated")
        try:
            block: bytes = self._decoder.decompress(data, _OUTPUT)
        except (EOFError, OSError, ValueError, self._error) as error:
            raise CorruptData(first_line(error)) from None
        self._input = getattr(self._decoder, "unconsumed_tail", b"")
        return block

    def _next_member(self) -> None:
        unused = self._decoder.unused_data.lstrip(b"\0")
        while len(unused) < HEAD and (block := self._file.read(_INPUT)):
            unused = (unused + block).lstrip(b"\0")
        if compression_of(unused) == self._kind:
            self._decoder, self._input = self._new(), unused
            return
        self._ended = True
        while unused:
            self.trailing += len(unused)
            unused = self._file.read(_OUTPUT)


def compression_of(head: bytes) -> str:
    """The compression of a file that starts with these bytes: `gzip`, `bzip2`, `xz`, `zstd`, `zip`, or empty."""
    if head.startswith(_GZIP):
        return "gzip"
    # A text may start with "BZh".
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bzip2"
    if head.startswith(_XZ):
        return "xz"
    # Files of the parallel tools start with skippable frames.
    if head.startswith(_ZSTD) or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F):
        return "zstd"
    return "zip" if head.startswith(_ZIP) else ""


def _decoder(kind: str) -> tuple[Callable[[], Any], type[Exception]]:
    """A factory of decoders, and the error that they raise for corrupt data."""
    if kind == "gzip":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if kind == "zstd":
        zstd = zstd_module()
        # Large windows are common in published dumps (`zstd --long=31`); the library's default refuses them.
        options = {zstd.DecompressionParameter.window_log_max: 31}
        return lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError
    return {"bzip2": (bz2.BZ2Decompressor, OSError), "xz": (lzma.LZMADecompressor, lzma.LZMAError)}[kind]


def zstd_module() -> Any:
    """The standard library's `compression.zstd`, or its backport. Raises ImportError without either."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        try:
            from backports import zstd
        except ImportError:
            raise ImportError("zstd needs the package backports.zstd: pip install 'lavic[crawl]'") from None
    return zstd
