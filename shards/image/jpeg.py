"""JPEGs without pixels: what their header says, whether every coded pixel is there, and odd files made regular."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import simplejpeg

from lavic.shards.image.tiff import read_orientation

LONGEST_SIDE = 65_500
"""Of a JPEG, as libjpeg reads and writes them."""

_SOI, _EOI, _SOS, _DHT, _TEM = 0xD8, 0xD9, 0xDA, 0xC4, 0x01
_RESTARTS = range(0xD0, 0xD8)
_FRAMES = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive"}
"""The kinds of frame that every reader knows, with Huffman coding."""
_OTHER_FRAMES = frozenset({0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)})
"""Arithmetic coding, lossless and hierarchical JPEG."""
_APP0, _APP1, _APP2, _APP14 = 0xE0, 0xE1, 0xE2, 0xEE
_PLAIN = frozenset({"Gray", "YCbCr", "RGB"})
_LEFT_OVER = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
_MOST_LEFT_OVER = 4
"""Bytes after the last coded pixel that some encoders write; more of them are a sign of damage."""
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""What ends the coded data of a scan: neither a stuffed byte nor a restart marker nor a fill byte."""
_TAIL = 64
"""Bytes at the end in which the end marker is looked for: some cameras and servers put a few after it."""


class JpegHeader(NamedTuple):
    """What is known before the first pixel is decoded."""

    width: int
    height: int
    mode: str
    """`L` or `RGB`, as Pillow calls what it is decoded to."""
    plain: bool
    """Grey or colour in a form that every reader knows; not CMYK, arithmetic coding or without its own tables."""
    orientation: int
    """As in EXIF: 1 is upright."""
    profile: bytes
    """The ICC profile, empty where there is none."""
    one_scan: bool
    """All pixels are in the first scan, as in baseline JPEGs."""


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None where it is none or its segments do not follow one another as they should."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    frame = components = 0
    tables = False
    orientation = 0
    profile: list[bytes] = []
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and (marker := data[at + 1]) != _SOS:
        size = data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES or marker in _OTHER_FRAMES:
            frame, components = marker, data[at + 9] if at + 9 < len(data) else 0
        elif marker == _DHT:
            tables = True
        elif marker == _APP1 and not orientation and data.startswith(b"Exif\0", at + 4):
            orientation = read_orientation(data[at + 10 : at + 2 + size])
        elif marker == _APP2 and data.startswith(b"ICC_PROFILE\0", at + 4):
            profile.append(data[at + 16 : at + 2 + size])
        at += 2 + size
    if data[at : at + 2] != bytes((0xFF, _SOS)) or at + 4 >= len(data):
        return None
    plain = colours in _PLAIN and frame in _FRAMES and tables
    one_scan = _FRAMES.get(frame) != "progressive" and data[at + 4] == components
    return JpegHeader(
        width,
        height,
        "L" if colours == "Gray" else "RGB",
        plain,
        orientation or 1,
        _join(profile) if profile else b"",
        one_scan,
    )


def count_scans(data: bytes) -> int:
    """At most so many scans are in a JPEG. The marker cannot occur within coded data."""
    values = np.frombuffer(data, np.uint8)
    # A third of the time of bytes.count.
    return int(np.count_nonzero(values[1:][values[:-1] == 0xFF] == _SOS))


def ends(data: bytes) -> bool:
    """Whether the end marker is where it should be."""
    return data.rfind(bytes((0xFF, _EOI)), -_TAIL) >= 0


def damage(data: bytes) -> str:
    """What is wrong with a JPEG's coded data, empty where nothing is.

    Every coded bit is read, at an eighth of the size and in grey, so that most of the arithmetic is not done. libjpeg
    draws something for damaged data and merely warns; here a warning counts.
    """
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        return str(error)
    return ""


def complete(data: bytes, wrong: str = "") -> bytes | None:
    """A JPEG that libjpeg warns about, in a form that every reader takes; None where coded pixels are missing.

    Args:
        data: The file.
        wrong: What `damage` says of it, where it was asked.

    Returns:
        The same bytes where only a few are left over behind the last pixel; otherwise the same coded pixels, not
        encoded again, in a file without what was odd: bytes between segments, a missing end marker, a JFIF version or
        a parameter of a scan that does not exist.
    """
    if not (made := _regular(data)):
        return None
    still = damage(made)
    spare = _LEFT_OVER.fullmatch(still)
    if still and not (spare and int(spare[1]) <= _MOST_LEFT_OVER and ends(data)):
        return None
    return data if _LEFT_OVER.fullmatch(wrong) else made


def has_every_scan(data: bytes) -> bool:
    """Whether the scans of a JPEG bring every coefficient to full precision.

    A progressive one that was cut between two scans and given an end marker looks whole to libjpeg.
    """
    return _regular(data) != b""


def _regular(data: bytes) -> bytes | None:
    """The file put together again from its segments and scans; empty where a scan is missing, None in other codings."""
    parts: list[bytes | bytearray] = [bytes((0xFF, _SOI))]
    missing: dict[int, set[int]] = {}
    """By component: coefficients that no scan has brought to full precision so far."""
    progressive = False
    adobe = bytearray()
    at = 2
    while (at := _marker(data, at)) >= 0:
        marker, at = data[at], at + 1
        if marker == _EOI:
            break
        if marker in _RESTARTS or marker == _TEM:
            continue
        size = int.from_bytes(data[at : at + 2], "big")
        segment = bytearray(data[at : at + size])
        if marker == _SOI or len(segment) < max(size, 8 if marker in _FRAMES or marker == _SOS else 2):
            break
        at += size
        if marker in _OTHER_FRAMES:
            return None
        if marker in _FRAMES:
            progressive = marker == 0xC2
            missing = {component: set(range(64)) for component in segment[8::3]}
        elif marker == _APP14 and segment[2:7] == b"Adobe" and len(segment) > 13:
            adobe = segment
        _mend(marker, segment, progressive)
        parts += (bytes((0xFF, marker)), segment)
        if marker == _SOS:
            _mend_transform(adobe, len(missing))
            first, last, precision = segment[-3], segment[-2], segment[-1] & 15
            for component in segment[3:-3:2] if not precision else ():
                missing.get(component, set()).difference_update(range(first, last + 1))
            found = _MARKER.search(data, at)
            parts.append(_coded(data[at : found.start() if found else len(data)]))
            at = found.start() if found else len(data)
    if not missing or any(missing.values()):
        return b""
    return b"".join((*parts, bytes((0xFF, _EOI))))


def _marker(data: bytes, at: int) -> int:
    """Where the next marker's second byte is, whatever is before it; -1 where there is none."""
    while (at := data.find(b"\xff", at)) >= 0:
        while at < len(data) and data[at] == 0xFF:
            at += 1
        if at >= len(data):
            break
        if data[at]:
            return at
    return -1


def _mend(marker: int, segment: bytearray, progressive: bool) -> None:
    """Set values that do not exist, and that decide no pixel, to what decoders take them for."""
    if marker == _APP0 and segment[2:7] == b"JFIF\0" and len(segment) > 7 and segment[7] != 1:
        segment[7:9] = b"\x01\x02"
    elif marker == _SOS and not progressive and len(segment) >= 6:
        segment[-3:] = b"\x00\x3f\x00"


def _mend_transform(adobe: bytearray, components: int) -> None:
    """Set a colour transform that does not exist for so many components to what decoders take it for."""
    if adobe and components in (3, 4) and adobe[13] not in (0, usual := {3: 1, 4: 2}[components]):
        adobe[13] = usual


def _coded(data: bytes) -> bytes:
    """A scan's coded data without filling behind it: fill bytes, and zeros where a file was given its length first."""
    data = data.rstrip(b"\xff")
    kept = data.rstrip(b"\x00")
    if kept.endswith(b"\xff"):
        # A last byte of all ones is stuffed with one zero; with more of them it is half of a marker.
        return kept + b"\x00" if len(data) == len(kept) + 1 else kept.rstrip(b"\xff")
    return kept


def _join(profile: list[bytes]) -> bytes:
    """A profile from its numbered pieces, each with its number and their count before it."""
    return b"".join(piece[2:] for piece in sorted(profile, key=lambda piece: piece[:1]))
