"""Writes a shard and its index."""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from lavic.data.manifest import ShardEntry
from lavic.data.tar_shards import BLOCK, MEMBERS, META, RECORD, Sample, index_path
from lavic.storage.atomic import atomic_open, atomic_write

_SCHEMA = (*META, *META.values())
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""A single encoder: `json.dumps` with options creates one at each call."""


class ShardWriter:
    """Writes a shard and its index atomically, when the block ends without an error.

    A shard without a sample is not written, and an older one of its name is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._offsets: list[int] = []
        self._stack = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, sample: Sample) -> None:
        """Appends one sample."""
        schema = (*sample.meta, *map(type, sample.meta.values()))
        assert schema == _SCHEMA, f"{sample.key}: the json member does not match META: {schema}"
        self._offsets.append(self.bytes)
        meta = _to_json(sample.meta)
        parts: list[bytes] = []
        for ending, data in zip(MEMBERS, (sample.jpg, meta.encode(), sample.text.encode()), strict=True):
            parts += (_header(f"{sample.key}.{ending}".encode(), len(data)), data, bytes(-len(data) % BLOCK))
        self._write(b"".join(parts))
        self.samples += 1

    @property
    def entry(self) -> ShardEntry:
        """The manifest's entry of the shard, once it is closed."""
        sha256 = self._hash.hexdigest()
        return ShardEntry(name=self.path.name, samples=self.samples, bytes=self.bytes, sha256=sha256)

    def __exit__(self, *raised: Any) -> None:
        complete = raised[0] is None
        if complete and self.samples:
            self._offsets.append(self.bytes)
            self._write(bytes(2 * BLOCK))
            self._write(bytes(-self.bytes % RECORD))
        self._stack.__exit__(*raised)
        if complete and self.samples:
            atomic_write(index_path(self.path), pack_offsets(self._offsets))
        elif complete:
            self.path.unlink(missing_ok=True)
            index_path(self.path).unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._file = self._stack.enter_context(atomic_open(self.path))
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)


def _header(name: bytes, size: int) -> bytes:
    """The header that `tarfile` writes for a member without time and owner, in a tenth of the time."""
    assert len(name) <= 100, f"{name!r} is too long for a USTAR name"
    octal = b"%011o" % size
    header = bytearray(_EMPTY)
    header[: len(name)] = name
    header[124:135] = octal
    # The checksum counts its own field as spaces.
    header[148:154] = b"%06o" % (_EMPTY_SUM + sum(name) + sum(octal) - 11 * ord("0"))
    return bytes(header)


_EMPTY = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_EMPTY_SUM = int(_EMPTY[148:154], 8)


def pack_offsets(offsets: Sequence[int]) -> bytes:
    """The content of an index, from the offsets of a shard's samples and the end of the last."""
    return struct.pack(f"<{len(offsets)}Q", *offsets)
