"""TIFF structures without pixels: the orientation that EXIF holds, and how many images a file has."""

from __future__ import annotations

from typing import Literal

_ORDERS: dict[bytes, Literal["little", "big"]] = {
    b"II*\x00": "little",
    b"MM\x00*": "big",
    b"II+\x00": "little",
    b"MM\x00+": "big",
}
"""Byte order by the first four bytes; with a plus: BigTIFF."""
_ORIENTATION = 0x0112
_WIDTHS = {1: 1, 3: 2, 4: 4}
"""Bytes of a number by its type: BYTE, SHORT, LONG."""


def read_orientation(data: bytes) -> int:
    """The orientation, 1 to 8, in a TIFF block such as EXIF; 1 where it says none or is broken.

    Broken EXIF says nothing about orientation, and nothing against the photo.
    """
    if (order := _order(data)) is None or len(data) < 8:
        return 1
    at = int.from_bytes(data[4:8], order)
    for n in range(int.from_bytes(data[at : at + 2], order)):
        entry = data[at + 2 + 12 * n : at + 14 + 12 * n]
        if len(entry) < 12:
            break
        if int.from_bytes(entry[:2], order) == _ORIENTATION:
            value = int.from_bytes(entry[8 : 8 + _WIDTHS.get(int.from_bytes(entry[2:4], order), 0)], order)
            return value if 1 <= value <= 8 else 1
    return 1


def count_images(data: bytes, most: int) -> int:
    """Images of a TIFF file, at most one more than `most`: until the chain ends, breaks off or leads back to itself."""
    if (order := _order(data)) is None:
        return 0
    big = int.from_bytes(data[2:4], order) == 43
    width, count_width, entry = (8, 8, 20) if big else (4, 2, 12)
    at = int.from_bytes(data[8:16] if big else data[4:8], order)
    seen: set[int] = set()
    while 0 < at < len(data) and at not in seen and len(seen) <= most:
        entries = int.from_bytes(data[at : at + count_width], order)
        link = at + count_width + entries * entry
        if link + width > len(data):
            break
        seen.add(at)
        at = int.from_bytes(data[link : link + width], order)
    return len(seen)


def _order(data: bytes) -> Literal["little", "big"] | None:
    return _ORDERS.get(data[:4])
