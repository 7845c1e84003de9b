"""How many frames a GIF has, by walking over its blocks: nothing is decoded, whatever they unpack to."""

from __future__ import annotations

_IMAGE, _EXTENSION = 0x2C, 0x21


def count_frames(data: bytes) -> int:
    """Frames of a GIF; of one that is cut, those that begin in it."""
    frames = 0
    at = 13 + _table(data[10]) if len(data) > 13 else len(data)
    while at < len(data):
        if data[at] == _IMAGE and at + 10 < len(data):
            frames += 1
            at = _skip(data, at + 11 + _table(data[at + 9]))
        elif data[at] == _EXTENSION:
            at = _skip(data, at + 2)
        else:
            break
    return frames


def _table(flags: int) -> int:
    """Bytes of the colour table that such flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _skip(data: bytes, at: int) -> int:
    """Behind a chain of blocks, each with its length before it and an empty one at its end."""
    while at < len(data) and data[at]:
        at += data[at] + 1
    return at + 1
