"""Repairs PNGs that decoders refuse although every pixel is there."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Values of a pixel by colour type."""
_NEEDED, _USEFUL = (b"PLTE", b"tRNS"), (b"iCCP", b"eXIf")
"""Chunks that affect pixels, and those that are dropped if they are damaged."""
_PASSES = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
"""Passes of Adam7: first column and step, first row and step."""


def has_intact_pixels(data: bytes) -> bool:
    """Whether the checksums of the compressed pixels are right, which Pillow ignores; True for other files."""
    return not data.startswith(_SIGNATURE) or all(valid for kind, _, valid in _chunks(data) if kind == b"IDAT")


def repair_png(data: bytes) -> bytes:
    """A PNG with the same pixels and correct checksums; empty if pixels are missing or may be wrong.

    A wrong checksum of a text, a missing end or bytes after the end do not affect pixels. The pixels are right if one
    of the two checksums over them is: the CRC of every IDAT chunk, or the Adler-32 of the compressed stream.
    """
    if not data.startswith(_SIGNATURE):
        return b""
    header = b""
    other_chunks: list[tuple[bytes, bytes]] = []
    compressed: list[bytes] = []
    crcs_valid = True
    for kind, body, valid in _chunks(data):
        if kind == b"IHDR" and valid and not header:
            header = body
        elif kind == b"IDAT":
            compressed.append(body)
            crcs_valid &= valid
        elif kind in _NEEDED and not valid:
            return b""
        elif kind in (*_NEEDED, *_USEFUL) and valid:
            other_chunks.append((kind, body))
    if len(header) != 13 or not compressed:
        return b""
    pixels = _decompress(b"".join(compressed), _raw_size(header), crcs_valid)
    if not pixels:
        return b""
    # Profile and palette must come before the pixels.
    order = sorted(other_chunks, key=lambda chunk: (b"iCCP", b"eXIf", b"PLTE", b"tRNS").index(chunk[0]))
    chunks = [(b"IHDR", header), *order, (b"IDAT", zlib.compress(pixels, 1)), (b"IEND", b"")]
    return _SIGNATURE + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Kind, body, and whether the checksum is right, up to the end or to where the file is cut."""
    offset = len(_SIGNATURE)
    while offset + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[offset : offset + 8])
        body = data[offset + 8 : offset + 8 + size]
        valid = data[offset + 8 + size : offset + 12 + size] == struct.pack(">I", zlib.crc32(kind + body))
        if kind == b"IEND" or not kind.isalpha():
            return
        yield kind, body, valid
        offset += 12 + size


def _raw_size(header: bytes) -> int:
    """Bytes of the uncompressed pixels, with the filter byte before each row."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * _SAMPLES.get(colour, 0)
    if not interlaced:
        return height * (1 + (width * bits + 7) // 8)
    size = 0
    for x, x_step, y, y_step in _PASSES:
        columns, rows = -(-(width - x) // x_step), -(-(height - y) // y_step)
        size += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    return size


def _decompress(compressed: bytes, size: int, crcs_valid: bool) -> bytes:
    """The uncompressed pixels; empty if some are missing, or if no checksum confirms them."""
    if not (pixels := _inflate(compressed, size, zlib.MAX_WBITS)):
        # Without the stream's own checksum, which is missing or wrong.
        return _inflate(compressed[2:], size, -zlib.MAX_WBITS) if crcs_valid else b""
    return pixels


def _inflate(compressed: bytes, size: int, window: int) -> bytes:
    stream = zlib.decompressobj(window)
    try:
        pixels = stream.decompress(compressed, size)
        # Read to the checksum at the end of the stream; surplus pixels are dropped.
        while window > 0 and not stream.eof:
            before = len(stream.unconsumed_tail)
            if not stream.decompress(stream.unconsumed_tail, 1 << 16) and len(stream.unconsumed_tail) == before:
                return b""
    except zlib.error:
        return b""
    return pixels if len(pixels) == size else b""


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
