"""Small files that are slow to decode; no encoder writes them."""

from __future__ import annotations

import struct
import zlib


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def many_scans(side: int, bits: int = 0) -> bytes:
    """A grey progressive JPEG with a scan for every coefficient and bit: 1 + 63 * (bits + 1) of them."""
    blocks = (-(-side // 8)) ** 2
    parts = [
        b"\xff\xd8",
        segment(0xDB, b"\0" + bytes([16] * 64)),
        segment(0xC2, struct.pack(">BHHB3B", 8, side, side, 1, 1, 0x11, 0)),
        segment(0xC4, b"\x00" + bytes((1, *bytes(15))) + b"\x00"),
        # Codes for runs of blocks without a coefficient: many (0) and one (10).
        segment(0xC4, b"\x10" + bytes((1, 1, *bytes(14))) + b"\xe0\x00"),
        segment(0xDA, bytes((1, 1, 0x00, 0, 0, 0))),
        entropy_coded("0" * blocks),
    ]
    runs = ""
    while blocks >= 1 << 14:
        run = min(blocks, 32767)
        runs += "0" + format(run - (1 << 14), "014b")
        blocks -= run
    data = entropy_coded(runs + "10" * blocks)
    for low in range(bits, -1, -1):
        for k in range(1, 64):
            high = 0 if low == bits else low + 1
            parts += (segment(0xDA, bytes((1, 1, 0x00, k, k, high << 4 | low))), data)
    return b"".join((*parts, b"\xff\xd9"))


def entropy_coded(bits: str) -> bytes:
    """Entropy-coded data of a scan: padded with ones, a zero byte after each 0xFF."""
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")


def many_directories(count: int) -> bytes:
    """A TIFF of `count` images of 64 x 48 grey pixels, which share their bytes."""
    pixels = bytes(64 * 48)
    tags = ((256, 64), (257, 48), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 48), (279, len(pixels)))
    size = 2 + 12 * len(tags) + 4
    start = 8 + len(pixels)
    entries = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    links = (start + (n + 1) * size if n + 1 < count else 0 for n in range(count))
    return b"II*\0" + struct.pack("<I", start) + pixels + b"".join(entries + struct.pack("<I", at) for at in links)


def many_chunks(count: int) -> bytes:
    """A PNG with `count` text chunks."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 48, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(48 * 65)))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"tEXt", b"a\0b") * count + pixels + chunk(b"IEND", b"")


def many_comments(count: int) -> bytes:
    """A GIF with a comment of `count` blocks before its image."""
    head = b"GIF89a" + struct.pack("<HHBBB", 64, 48, 0x80, 0, 0) + bytes(6)
    image = b"\x2c" + struct.pack("<HHHHB", 0, 0, 64, 48, 0) + b"\x02\x02\x4c\x01\x00\x3b"
    return head + b"\x21\xfe" + (b"\x01a" * count) + b"\0" + image
