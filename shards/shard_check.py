"""One shard against its manifest: the tar, its index, its ledger, its references and its seal, each read once.

Whatever is in these files, a difference is a line that names the file, and nothing is read beyond a file's own size.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lavic.data.duplicates import Reference, parse_references, references_path
from lavic.data.ledger import ledger_path
from lavic.data.manifest import EMPTY_TAR, NAME, Manifest, ShardEntry
from lavic.data.tar_shards import BLOCK, MEMBERS, META, Sample, index_path, member_bytes, pack_offsets, parse_sample
from lavic.errors import DataError, first_line
from lavic.shards.pack.outcomes import parse_ledger
from lavic.shards.pack.seal import Seal, seal_path, unpack_seal
from lavic.shards.plan.external_dedup import mark_of
from lavic.storage.paths import storage_errors

_TAIL = 8 << 20


@dataclass
class ShardCheck:
    """What was seen of a shard. Of its keys eight bytes each: there may be millions."""

    differences: list[str] = field(default_factory=list)
    marks: bytearray = field(default_factory=bytearray)
    samples: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    references: list[tuple[str, str, str]] = field(default_factory=list)
    """Key, the key it refers to, and the tar that holds it."""

    @property
    def numbers(self) -> np.ndarray:
        """The marks as uint64 [samples]."""
        return np.frombuffer(bytes(self.marks), "<u8")


def check_shard(manifest: Manifest, entry: ShardEntry, files: Mapping[str, int]) -> ShardCheck:
    """Re-read a shard and the files beside it, each once.

    Args:
        manifest: Of the set.
        entry: The shard; one without samples has no tar, or an empty one.
        files: Bytes of the files in the set's folder, by name.
    """
    look = ShardCheck()
    path = manifest.path(entry)
    try:
        keys = _read_tar(path, entry, files, look) if entry.samples else []
        if entry.name in manifest.empty and not _is_empty_tar(path, files):
            look.differences.append(f"{path}: not the empty tar that stands for a shard without a photo")
    except storage_errors() as error:
        look.differences.append(f"{path}: cannot be read ({first_line(error)})")
        return look
    look.differences += _beside(manifest, entry, keys, files, look)
    return look


def _is_empty_tar(path: Path, files: Mapping[str, int]) -> bool:
    return files.get(path.name) == len(EMPTY_TAR) and path.read_bytes() == EMPTY_TAR


def _read_tar(path: Path, entry: ShardEntry, files: Mapping[str, int], look: ShardCheck) -> list[str] | None:
    """Read a tar from end to end; gives the keys of its samples, None where it is damaged."""
    found, keys, offsets = look.differences, [], [0]
    with path.open("rb") as file:
        reader = _Reader(file, files.get(path.name, 0))
        try:
            for sample in _samples(reader, path):
                keys.append(sample.key)
                offsets.append(reader.bytes)
                look.marks += mark_of(sample.key)
                found += [f"{path}: {sample.key}: {what}" for what in _wrong(sample)]
            if reader.rest():
                found.append(f"{path}: has other bytes after its last sample")
        except DataError as error:
            found.append(str(error))
            offsets = []
        reader.rest()
    look.samples = len(keys)
    if reader.bytes != entry.bytes:
        found.append(f"{path}: {reader.bytes:,} bytes, the manifest says {entry.bytes:,}")
    if (digest := reader.sha256.hexdigest()) != entry.sha256:
        found.append(f"{path}: sha256 {digest[:12]}..., the manifest says {entry.sha256[:12]}...")
    if len(keys) != entry.samples:
        found.append(f"{path}: {len(keys):,} samples, the manifest says {entry.samples:,}")
    if not offsets:
        return None
    expected = pack_offsets(offsets)
    if (index := _read(index_path(path), files, found, most=len(expected))) is not None and index != expected:
        found.append(f"{index_path(path)}: is not the index of its tar")
    return keys


def _samples(reader: _Reader, path: Path) -> Iterator[Sample]:
    """The samples of a tar, up to its end."""
    while True:
        start = reader.bytes
        parts: list[bytes] = []
        for _ in MEMBERS:
            header = reader.take(BLOCK)
            if not parts and not header.strip(b"\0"):
                return
            size = member_bytes(header, f"{path} at byte {start}") - BLOCK
            if size > reader.left:
                raise DataError(f"{path} at byte {start}: a member is cut short")
            parts += (header, reader.take(size))
        yield parse_sample(b"".join(parts), f"{path} at byte {start}")


def _read(path: Path, files: Mapping[str, int], found: list[str], most: int = 0) -> bytes | None:
    """A file beside a shard, or None and a difference where it cannot be read. `most` bounds what is read of it."""
    if path.name not in files:
        found.append(f"{path}: is missing")
        return None
    try:
        with path.open("rb") as file:
            return file.read(most + 1) if most else file.read()
    except storage_errors() as error:
        found.append(f"{path}: cannot be read ({first_line(error)})")
        return None


class _Reader:
    """Reads a file of a known size once from end to end, and hashes it on the way."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    @property
    def left(self) -> int:
        """Bytes that have not been read yet."""
        return self._size - self.bytes

    def take(self, count: int) -> bytes:
        """The next bytes."""
        data = self._file.read(count)
        self.bytes += len(data)
        self.sha256.update(data)
        return data

    def rest(self) -> bool:
        """Reads to the end; whether there was anything but zeros."""
        other = False
        while data := self.take(_TAIL):
            other = other or bool(data.strip(b"\0"))
        return other


def _beside(
    manifest: Manifest, entry: ShardEntry, keys: list[str] | None, files: Mapping[str, int], look: ShardCheck
) -> Iterator[str]:
    """Differences in the ledger, the references and the seal of a shard, each of which is read once."""
    path = manifest.path(entry)
    ledger, references, seal = ledger_path(path), references_path(path), seal_path(path)
    if not manifest.plan and ledger.name not in files:
        return  # no crawl made this set
    found: list[str] = []
    digests: dict[Path, str] = {}
    rows, referred, sealed = [], [], None
    try:
        if (data := _read(ledger, files, found)) is not None:
            digests[ledger] = hashlib.sha256(data).hexdigest()
            rows = parse_ledger(data, ledger)
        if references.name in files and (data := _read(references, files, found)) is not None:
            digests[references] = hashlib.sha256(data).hexdigest()
            referred = parse_references(data, references)
        if manifest.plan and (data := _read(seal, files, found)) is not None:
            sealed = _parse_seal(data, seal)
    except DataError as error:
        yield str(error)
        return
    yield from found
    if found:
        return
    look.outcomes.update(row.kind for row in rows)
    look.references += [(one.key, one.same_as, one.shard) for one in referred]
    elsewhere = {one.key for one in referred}
    stored = [row.key for row in rows if row.kind == "ok" and row.key not in elsewhere]
    if keys is not None and stored != keys:
        yield f"{ledger}: has {len(stored):,} photos as ok, and they are not those of the shard"
    yield from _wrong_references(referred, references)
    if sealed:
        yield from _against_seal(sealed, seal, entry, look, digests, ledger, references)


def _parse_seal(data: bytes, path: Path) -> Seal:
    try:
        return unpack_seal(data)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: broken seal ({error}); run the crawl of this set again") from None


def _wrong_references(referred: Sequence[Reference], path: Path) -> Iterator[str]:
    for one in referred:
        yield from (f"{path}: {one.key}: {what}" for what in _wrong_meta(one.key, one.meta))


def _against_seal(
    sealed: Seal,
    path: Path,
    entry: ShardEntry,
    look: ShardCheck,
    digests: Mapping[Path, str],
    ledger: Path,
    references: Path,
) -> Iterator[str]:
    """A shard as the manifest has it, and the files beside it, against what was sealed."""
    if sealed.entry != entry and (sealed.entry.samples or entry.samples):
        yield f"{path}: seals another shard than the one in {NAME}"
    if dict(sealed.outcomes) != dict(look.outcomes):
        yield f"{path}: has other outcomes than {ledger.name}"
    for file, digest in ((ledger, sealed.ledger_sha256), (references, sealed.references_sha256)):
        if digest and digests.get(file) != digest:
            yield f"{file}: is not as it was written; {path.name} has another sha256"


def _wrong(sample: Sample) -> Iterator[str]:
    wrong = list(_wrong_meta(sample.key, sample.meta))
    yield from wrong
    if not wrong and hashlib.sha256(sample.jpg).hexdigest() != sample.meta["sha256"]:
        yield "the photo is not the one that was stored"


def _wrong_meta(key: str, meta: Mapping[str, object]) -> Iterator[str]:
    if {name: type(value) for name, value in meta.items()} != META:
        yield "its json member has other keys or types than it should"
    elif meta["key"] != key:
        yield f"its json member says {meta['key']}"
