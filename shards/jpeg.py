"""JPEGs without pixels: what their header says, and whether their stream of coded data is whole."""

from __future__ import annotations

import re
from dataclasses import dataclass

import simplejpeg

_SCAN, _END = 0xDA, 0xD9
_EXIF, _ICC = (0xE1, b"Exif\0"), (0xE2, b"ICC_PROFILE\0")
_PLAIN = frozenset({"Gray", "YCbCr", "RGB"})
_SPILT = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd9")
_TAIL = 64
"""Bytes at the end in which the end marker is looked for: some cameras and servers put a few after it."""


@dataclass(frozen=True)
class JpegHeader:
    """What is told before the first pixel."""

    width: int
    height: int
    plain: bool
    """Grey or colour as every decoder reads them; not CMYK."""
    exif: bool
    icc: bool


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG, or None where it is not a JPEG or one that must be looked at more closely."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    exif = icc = False
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _SCAN:
        marker, size = data[at + 1], data[at + 2] << 8 | data[at + 3]
        exif |= marker == _EXIF[0] and data.startswith(_EXIF[1], at + 4)
        icc |= marker == _ICC[0] and data.startswith(_ICC[1], at + 4)
        at += 2 + size
    if data[at : at + 2] != bytes((0xFF, _SCAN)):
        return None
    return JpegHeader(width, height, colours in _PLAIN, exif, icc)


def ends(data: bytes) -> bool:
    """Whether the end marker is where it should be."""
    return data.rfind(bytes((0xFF, _END)), -_TAIL) >= 0


def damage(data: bytes) -> str:
    """What is wrong with a plain JPEG's coded data, empty where it is whole.

    Every coded bit is read, at an eighth of the size and in grey, so that most of the arithmetic is not done. libjpeg
    draws something for damaged data and merely warns; here a warning counts, but for bytes that are left over at the
    end, after every pixel was read, which some encoders write.
    """
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        if not _SPILT.fullmatch(str(error)):
            return str(error)
    return ""
