"""JPEGs without decoding: their header, whether every coded pixel is there, and repair of malformed files."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg

LONGEST_SIDE = 65_500
"""Longest side of a JPEG that libjpeg reads and writes."""

_SOI, _EOI, _SOS, _DHT, _TEM = 0xD8, 0xD9, 0xDA, 0xC4, 0x01
_RESTARTS = range(0xD0, 0xD8)
_FRAMES = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive"}
"""The kinds of frame that every reader knows, with Huffman coding."""
_OTHER_FRAMES = frozenset({0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)})
"""Arithmetic coding, lossless and hierarchical JPEG."""
_APP0, _APP1, _APP2, _APP14 = 0xE0, 0xE1, 0xE2, 0xEE
_PLAIN = frozenset({"Gray", "YCbCr", "RGB"})
_EXTRANEOUS = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
_MAX_EXTRANEOUS = 4
"""Bytes after the last coded pixel that some encoders write; more of them are a sign of damage."""
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""Ends the coded data of a scan: neither a stuffed byte nor a restart marker nor a fill byte."""
_TAIL = 64
"""Bytes at the end in which the end marker is searched: some cameras and servers write a few after it."""
_BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\x00": "little", b"MM\x00*": "big"}
"""Byte order of EXIF, by its first four bytes."""
_ORIENTATION = 0x0112
_INTEGER_SIZES = {1: 1, 3: 2, 4: 4}
"""Bytes of a number in EXIF by its type: BYTE, SHORT, LONG."""


class JpegHeader(NamedTuple):
    """What a JPEG says before its first pixel."""

    width: int
    height: int
    mode: str
    """Pillow's mode of the decoded image, `L` or `RGB`."""
    plain: bool
    """Grey or colour in a form that every reader knows: no CMYK, arithmetic coding or missing Huffman tables."""
    orientation: int
    """As in EXIF: 1 is upright."""
    profile: bytes
    """The ICC profile, empty if there is none."""
    one_scan: bool
    """All pixels are in the first scan, as in baseline JPEGs."""


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None for other files, and for malformed segments."""
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    frame = components = 0
    tables = False
    orientation = 0
    profile: list[bytes] = []
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF and (marker := data[offset + 1]) != _SOS:
        size = data[offset + 2] << 8 | data[offset + 3]
        if marker in _FRAMES or marker in _OTHER_FRAMES:
            frame, components = marker, data[offset + 9] if offset + 9 < len(data) else 0
        elif marker == _DHT:
            tables = True
        elif marker == _APP1 and not orientation and data.startswith(b"Exif\0", offset + 4):
            orientation = _read_orientation(data[offset + 10 : offset + 2 + size])
        elif marker == _APP2 and data.startswith(b"ICC_PROFILE\0", offset + 4):
            profile.append(data[offset + 16 : offset + 2 + size])
        offset += 2 + size
    if data[offset : offset + 2] != bytes((0xFF, _SOS)) or offset + 4 >= len(data):
        return None
    is_plain = color_space in _PLAIN and frame in _FRAMES and tables
    one_scan = _FRAMES.get(frame) != "progressive" and data[offset + 4] == components
    return JpegHeader(
        width,
        height,
        "L" if color_space == "Gray" else "RGB",
        is_plain,
        orientation or 1,
        _join_profile(profile) if profile else b"",
        one_scan,
    )


def count_scans(data: bytes) -> int:
    """An upper bound of the scans in a JPEG. The marker cannot occur within coded data."""
    values = np.frombuffer(data, np.uint8)
    # A third of the time of bytes.count.
    return int(np.count_nonzero(values[1:][values[:-1] == 0xFF] == _SOS))


def has_end_marker(data: bytes) -> bool:
    """Whether the end marker is at the end."""
    return data.rfind(bytes((0xFF, _EOI)), -_TAIL) >= 0


def find_damage(data: bytes) -> str:
    """The first error in a JPEG's coded data, empty if there is none.

    Every coded bit is read, at an eighth of the size and in grey, which saves most of the arithmetic. libjpeg only
    warns of damaged data; here a warning is an error.
    """
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        return str(error)
    return ""


def repair(data: bytes, error: str) -> bytes | None:
    """A JPEG that libjpeg warns about, in a form that every reader accepts; None if coded pixels are missing.

    Args:
        data: The file.
        error: From `find_damage`.

    Returns:
        The same bytes if only a few extraneous ones follow the last pixel; otherwise the same coded pixels, not encoded
        again, in a file without what was malformed: bytes between segments, a missing end marker, a JFIF version or a
        parameter of a scan that does not exist.
    """
    if not (rebuilt := _rebuilt(data)):
        return None
    remaining = find_damage(rebuilt)
    extraneous = _EXTRANEOUS.fullmatch(remaining)
    if remaining and not (extraneous and int(extraneous[1]) <= _MAX_EXTRANEOUS and has_end_marker(data)):
        return None
    return data if _EXTRANEOUS.fullmatch(error) else rebuilt


def has_every_scan(data: bytes) -> bool:
    """Whether the scans of a JPEG bring every coefficient to full precision.

    libjpeg does not notice if a progressive one was cut between two scans and has an end marker.
    """
    return _rebuilt(data) != b""


def _rebuilt(data: bytes) -> bytes | None:
    """The file rebuilt from its segments and scans; empty if a scan is missing, None for other codings."""
    parts: list[bytes | bytearray] = [bytes((0xFF, _SOI))]
    missing: dict[int, set[int]] = {}
    """By component: coefficients that no scan has brought to full precision yet."""
    progressive = False
    adobe = bytearray()
    offset = 2
    while (offset := _next_marker(data, offset)) >= 0:
        marker, offset = data[offset], offset + 1
        if marker == _EOI:
            break
        if marker in _RESTARTS or marker == _TEM:
            continue
        size = int.from_bytes(data[offset : offset + 2], "big")
        segment = bytearray(data[offset : offset + size])
        if marker == _SOI or len(segment) < max(size, 8 if marker in _FRAMES or marker == _SOS else 2):
            break
        offset += size
        if marker in _OTHER_FRAMES:
            return None
        if marker in _FRAMES:
            progressive = marker == 0xC2
            missing = {component: set(range(64)) for component in segment[8::3]}
        elif marker == _APP14 and segment[2:7] == b"Adobe" and len(segment) > 13:
            adobe = segment
        _fix_segment(marker, segment, progressive)
        parts += (bytes((0xFF, marker)), segment)
        if marker == _SOS:
            _fix_color_transform(adobe, len(missing))
            first, last, precision = segment[-3], segment[-2], segment[-1] & 15
            for component in segment[3:-3:2] if not precision else ():
                missing.get(component, set()).difference_update(range(first, last + 1))
            marker_after = _MARKER.search(data, offset)
            end = marker_after.start() if marker_after else len(data)
            parts.append(_trim_padding(data[offset:end]))
            offset = end
    if not missing or any(missing.values()):
        return b""
    return b"".join((*parts, bytes((0xFF, _EOI))))


def _next_marker(data: bytes, offset: int) -> int:
    """The position of the next marker's second byte, skipping anything before it; -1 if there is none."""
    while (offset := data.find(b"\xff", offset)) >= 0:
        while offset < len(data) and data[offset] == 0xFF:
            offset += 1
        if offset >= len(data):
            break
        if data[offset]:
            return offset
    return -1


def _fix_segment(marker: int, segment: bytearray, progressive: bool) -> None:
    """Set invalid values that affect no pixel to those that decoders assume."""
    if marker == _APP0 and segment[2:7] == b"JFIF\0" and len(segment) > 7 and segment[7] != 1:
        segment[7:9] = b"\x01\x02"
    elif marker == _SOS and not progressive and len(segment) >= 6:
        segment[-3:] = b"\x00\x3f\x00"


def _fix_color_transform(adobe: bytearray, components: int) -> None:
    """Set an invalid colour transform to the one that decoders assume for this number of components."""
    if adobe and components in (3, 4) and adobe[13] not in (0, usual := {3: 1, 4: 2}[components]):
        adobe[13] = usual


def _trim_padding(data: bytes) -> bytes:
    """A scan's coded data without padding: fill bytes, and zeros of files that were allocated first."""
    data = data.rstrip(b"\xff")
    trimmed = data.rstrip(b"\x00")
    if trimmed.endswith(b"\xff"):
        # A last byte of all ones is stuffed with one zero; with more of them it is half of a marker.
        return trimmed + b"\x00" if len(data) == len(trimmed) + 1 else trimmed.rstrip(b"\xff")
    return trimmed


def _join_profile(profile: list[bytes]) -> bytes:
    """A profile from its pieces, each of which begins with its number and their count."""
    return b"".join(piece[2:] for piece in sorted(profile, key=lambda piece: piece[:1]))


def _read_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in an EXIF block; 1 if there is none or it is broken, which is no reason to refuse."""
    if (order := _BYTE_ORDERS.get(exif[:4])) is None or len(exif) < 8:
        return 1
    offset = int.from_bytes(exif[4:8], order)
    for n in range(int.from_bytes(exif[offset : offset + 2], order)):
        entry = exif[offset + 2 + 12 * n : offset + 14 + 12 * n]
        if len(entry) < 12:
            break
        if int.from_bytes(entry[:2], order) == _ORIENTATION:
            size = _INTEGER_SIZES.get(int.from_bytes(entry[2:4], order), 0)
            value = int.from_bytes(entry[8 : 8 + size], order)
            return value if 1 <= value <= 8 else 1
    return 1
