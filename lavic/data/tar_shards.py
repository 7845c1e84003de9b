"""The format of a shard: its samples, and how they are read from a tar, also by offset.

A shard is a USTAR file that webdataset, Hugging Face `datasets`, Ray and open_clip read unchanged. A sample is three
adjacent members, `<key>.jpg`, `<key>.json`, `<key>.txt`. Equal samples give equal bytes: times and owners are zero.
`<shard>.tar.idx` is beside it: little-endian uint64, the offset of every sample and the end of the last.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lavic.errors import DataError, first_line
from lavic.storage.paths import storage_errors

if TYPE_CHECKING:
    from PIL.Image import Image

META: dict[str, type] = {
    "key": str,
    "item_id": str,
    "n": int,
    "title": str,
    "url": str,
    "categories": str,
    "details": str,
    "width": int,
    "height": int,
    "sha256": str,
    "source_sha256": str,
}
"""Keys and types of every sample's json member, in this order, so that loaders infer the same schema from any sample.

`categories` is joined with " > "; `details` is a JSON object with the catalogue's free-form fields; `width` and
`height` are pixels; `sha256` is of the jpg member, `source_sha256` of the bytes that the server sent.
"""

MEMBERS = ("jpg", "json", "txt")
BLOCK, RECORD = 512, 10240
"""Bytes that members, and a whole tar, are padded to."""
_SAFE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


def sample_key(item_id: str, n: int) -> str:
    """`<item_id>_<n>`, always `[A-Za-z0-9_-]+` and short enough for a USTAR name.

    An id with other characters (loaders split names at the first dot; ids must never become paths), or a very long one,
    is replaced by its safe part and a digest of the id; the json member has the unchanged id.
    """
    if not _SAFE.fullmatch(item_id):
        digest = hashlib.sha256(item_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        item_id = f"{_UNSAFE.sub('-', item_id)[:40].strip('-')}-{digest}"
    return f"{item_id}_{n}"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One photo with its metadata."""

    key: str
    item_id: str
    jpg: bytes
    """A JPEG file, upright, RGB or grey."""
    meta: dict[str, Any]
    """The json member, see `META`."""
    text: str = ""
    """Description of the photo, or empty."""

    @classmethod
    def of(
        cls,
        *,
        item_id: str,
        n: int,
        jpg: bytes,
        title: str,
        width: int,
        height: int,
        text: str = "",
        url: str = "",
        categories: str = "",
        details: str = "{}",
        source_sha256: str = "",
        sha256: str = "",
    ) -> Sample:
        """Makes a sample whose json member has every key of `META`; `sha256` of `jpg` if it is known already."""
        key, sha256 = sample_key(item_id, n), sha256 or hashlib.sha256(jpg).hexdigest()
        values = (key, item_id, n, title, url, categories, details, width, height, sha256, source_sha256 or sha256)
        return cls(key=key, item_id=item_id, jpg=jpg, meta=dict(zip(META, values, strict=True)), text=text)

    @property
    def title(self) -> str:
        """The item's title."""
        return self.meta["title"]

    @property
    def image(self) -> Image:
        """The photo, decoded, as RGB."""
        from PIL import Image

        return Image.open(io.BytesIO(self.jpg)).convert("RGB")


def index_path(shard: Path) -> Path:
    """The path of a shard's index."""
    return shard.with_name(shard.name + ".idx")


def read_offsets(shard: Path, samples: int, size: int) -> np.ndarray:
    """The offsets of the samples of a tar of `size` bytes, and the end of the last: uint64 [samples + 1].

    Raises:
        DataError: The index is missing, or does not fit the tar.
    """
    path = index_path(shard)
    hint = f"`lavic verify {shard.parent}` lists every difference"
    try:
        with path.open("rb") as file:
            data = file.read(8 * (samples + 1) + 1)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {hint}") from None
    except storage_errors() as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); {hint}") from None
    offsets = np.frombuffer(data[: len(data) // 8 * 8], "<u8")
    increasing = len(data) == 8 * (samples + 1) and offsets[0] == 0 and bool((offsets[1:] > offsets[:-1]).all())
    if not increasing or not 0 <= size - int(offsets[-1]) - 2 * BLOCK < RECORD:
        raise DataError(f"{path} does not belong to its shard; {hint}")
    return offsets


def sidecar_path(shard: Path, ending: str) -> Path:
    """The path of a shard's sidecar: `x-000000.tar`, `ledger.jsonl` -> `x-000000.ledger.jsonl`."""
    return shard.with_name(f"{shard.name.removesuffix('.tar')}.{ending}")


def parse_sample(data: bytes, location: str) -> Sample:
    """Parses the bytes between two offsets of the index.

    Raises:
        DataError: They are not the three members of one key; the message starts with `location`.
    """
    parts = dict(_members(data, location))
    keys = {name.partition(".")[0] for name in parts}
    if len(keys) != 1 or tuple(name.partition(".")[2] for name in parts) != MEMBERS:
        raise DataError(f"{location}: expected one sample of {', '.join(MEMBERS)}, got {', '.join(parts) or 'nothing'}")
    jpg, meta_bytes, text = parts.values()
    try:
        meta = json.loads(meta_bytes)
        return Sample(key=keys.pop(), item_id=meta["item_id"], jpg=jpg, meta=meta, text=text.decode())
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{location}: broken json or txt member ({error})") from None


def member_bytes(header: bytes, location: str) -> int:
    """Bytes of a member in a tar, with its header and padding. Raises DataError for an invalid header."""
    size = _parse_header(header, location).size
    return BLOCK + size + -size % BLOCK


def parse_metadata(data: bytes, location: str) -> tuple[dict[str, Any], str]:
    """Parses the json and the txt member of a sample, which follow its jpg. Raises DataError for anything else."""
    try:
        (_, meta), (_, text) = _members(data, location)
        return json.loads(meta), text.decode()
    except ValueError as error:
        raise DataError(f"{location}: broken json or txt member ({error})") from None


def read_samples(shard: Path) -> Iterator[Sample]:
    """Reads a shard sequentially, without its index. Raises DataError as `iter_samples`, and for a missing file."""
    try:
        with shard.open("rb") as file:
            yield from iter_samples(file.read, shard.stat().st_size, str(shard))
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error})") from None


def iter_samples(read: Callable[[int], bytes], size: int, location: str) -> Iterator[Sample]:
    """The samples of a tar of `size` bytes, read by `read`; the bytes after the last sample are not read.

    Raises:
        DataError: It is truncated, or contains something other than samples.
    """
    end = 0
    while True:
        start, parts = end, b""
        for _ in MEMBERS:
            header = read(BLOCK)
            if not parts and len(header) in (0, BLOCK) and not header.strip(b"\0"):
                return
            end += member_bytes(header, f"{location} at byte {start}")
            if end > size:
                raise DataError(f"{location} at byte {start}: a member is truncated")
            parts += header + read(end - start - len(parts) - BLOCK)
        yield parse_sample(parts, f"{location} at byte {start}")


def sample_ranges(file: BinaryIO, location: str) -> Iterator[tuple[str, int, int]]:
    """Key, start and end of every sample of a tar, from the headers alone. Raises DataError as `iter_samples`."""
    size = file.seek(0, os.SEEK_END)
    end = 0
    while end < size:
        start, key = end, ""
        for _ in MEMBERS:
            file.seek(end)
            header = file.read(BLOCK)
            if not key and not header.strip(b"\0"):
                return
            member = _parse_header(header, f"{location} at byte {start}")
            end += BLOCK + member.size + -member.size % BLOCK
            if end > size:
                raise DataError(f"{location} at byte {start}: a member is truncated")
            key = member.name.partition(".")[0]
        yield key, start, end


def _members(data: bytes, location: str) -> Iterator[tuple[str, bytes]]:
    start = 0
    while start < len(data):
        member = _parse_header(data[start : start + BLOCK], location)
        body = data[start + BLOCK : start + BLOCK + member.size]
        if len(body) != member.size:
            raise DataError(f"{location}: member {member.name} is truncated; `lavic verify` shows more")
        yield member.name, body
        start += BLOCK + member.size + -member.size % BLOCK


def _parse_header(header: bytes, location: str) -> tarfile.TarInfo:
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        if member.size < 0:
            raise ValueError("a negative size")
    except (tarfile.HeaderError, ValueError) as error:
        raise DataError(f"{location}: broken tar header ({error}); `lavic verify` shows more") from None
    return member
