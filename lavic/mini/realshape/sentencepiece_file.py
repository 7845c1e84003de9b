"""Reads a SentencePiece model file: its pieces with their scores and kinds, and how a text is prepared.

The file is one protocol buffer message, `ModelProto`. These of its fields are read:

* `pieces` (1), of which `piece` (1), `score` (2) and `type` (3);
* `trainer_spec` (2), of which `model_type` (3) and `byte_fallback` (35);
* `normalizer_spec` (3), of which `precompiled_charsmap` (2), `add_dummy_prefix` (3) and `remove_extra_whitespaces` (4).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavic.errors import DataError, first_line

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of a piece."""
BPE = 2
"""`model_type` of byte-pair encoding."""


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class SentencePieceFile:
    """What a model file contains; defaults are those of the format."""

    pieces: tuple[Piece, ...]
    model_type: int = 1
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    """Whether a text gets a space at its beginning."""
    remove_extra_whitespaces: bool = True
    """Whether repeated spaces become one."""
    charsmap: bool = False
    """Whether characters are mapped to others first."""

    @classmethod
    def read(cls, path: Path) -> SentencePieceFile:
        """Reads a model file.

        Raises:
            DataError: It cannot be read, or is not a SentencePiece model.
        """
        pieces: list[Piece] = []
        options: dict[str, Any] = {}
        try:
            for field, value in _fields(path.read_bytes()):
                if field == 1:
                    piece = dict(_fields(value))
                    (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                    pieces.append(Piece(piece[1].decode("utf-8"), score, int(piece.get(3, NORMAL))))
                elif field == 2:
                    trainer = dict(_fields(value))
                    options |= {"model_type": int(trainer.get(3, 1)), "byte_fallback": bool(trainer.get(35, 0))}
                elif field == 3:
                    prepare = dict(_fields(value))
                    options["add_dummy_prefix"] = bool(prepare.get(3, 1))
                    options["remove_extra_whitespaces"] = bool(prepare.get(4, 1))
                    options["charsmap"] = bool(prepare.get(2))
        except (OSError, LookupError, ValueError, TypeError, AttributeError, struct.error) as e:
            raise DataError(f"{path}: not a SentencePiece model ({first_line(e)})") from None
        if not pieces:
            raise DataError(f"{path}: not a SentencePiece model (no pieces)")
        return cls(pieces=tuple(pieces), **options)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: an integer, or the bytes of a string, message or fixed number."""
    offset = 0
    while offset < len(data):
        key, offset = _varint(data, offset)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, offset = _varint(data, offset)
            yield number, value
            continue
        if wire == 2:
            size, offset = _varint(data, offset)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if offset + size > len(data):
            raise ValueError("it ends too early")
        yield number, data[offset : offset + size]
        offset += size


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            return value, offset
        if shift > 63:
            raise ValueError("a number without an end")
