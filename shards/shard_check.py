"""Compares one shard with its manifest: tar, index, ledger, references and seal, each of which is read once.

Every difference is a line that names the file, whatever is in it, and nothing is read beyond a file's size.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lavic.data.duplicates import parse_references, references_path
from lavic.data.ledger import ledger_path
from lavic.data.manifest import EMPTY_TAR, NAME, Manifest, ShardEntry
from lavic.data.tar_shards import META, Sample, index_path, iter_samples
from lavic.data.tar_writer import pack_offsets
from lavic.errors import DataError, first_line
from lavic.shards.pack.outcomes import parse_ledger
from lavic.shards.pack.seal import Seal, seal_path, unpack_seal
from lavic.shards.plan.external_dedup import hash64
from lavic.storage.paths import storage_errors

_CHUNK = 8 << 20


@dataclass
class ShardCheck:
    """The result for one shard."""

    differences: list[str] = field(default_factory=list)
    hashes: bytearray = field(default_factory=bytearray)
    """Eight bytes per key: there may be millions."""
    samples: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    references: list[tuple[str, str, str]] = field(default_factory=list)
    """Key, the key it refers to, and the tar that holds it."""

    @property
    def key_hashes(self) -> np.ndarray:
        """The hashes as uint64 [samples]."""
        return np.frombuffer(bytes(self.hashes), "<u8")


def check_shard(manifest: Manifest, entry: ShardEntry, files: Mapping[str, int]) -> ShardCheck:
    """Read a shard and the files beside it, each once; `files`: sizes of the folder's files by name.

    An entry without samples has no tar, or an empty one.
    """
    check = ShardCheck()
    path = manifest.path(entry)
    try:
        keys = _read_tar(path, entry, files, check) if entry.samples else []
        is_empty = entry.name in manifest.empty
        if is_empty and (files.get(path.name) != len(EMPTY_TAR) or path.read_bytes() != EMPTY_TAR):
            check.differences.append(f"{path}: not the empty tar of a shard without a photo")
    except storage_errors() as error:
        check.differences.append(f"{path}: cannot be read ({first_line(error)})")
        return check
    check.differences += _beside(manifest, entry, keys, files, check)
    return check


def _read_tar(path: Path, entry: ShardEntry, files: Mapping[str, int], check: ShardCheck) -> list[str] | None:
    """Read a tar from end to end; returns the keys of its samples, None if it is damaged."""
    differences, keys, offsets = check.differences, [], [0]
    with path.open("rb") as file:
        reader = _Reader(file)
        try:
            for sample in iter_samples(reader.take, files.get(path.name, 0), str(path)):
                keys.append(sample.key)
                offsets.append(reader.bytes)
                check.hashes += hash64(sample.key)
                differences += [f"{path}: {sample.key}: {error}" for error in _sample_errors(sample)]
            if reader.finish():
                differences.append(f"{path}: has other bytes after its last sample")
        except DataError as error:
            differences.append(str(error))
            offsets = []
        reader.finish()
    check.samples = len(keys)
    if reader.bytes != entry.bytes:
        differences.append(f"{path}: {reader.bytes:,} bytes, the manifest says {entry.bytes:,}")
    if (digest := reader.sha256.hexdigest()) != entry.sha256:
        differences.append(f"{path}: sha256 {digest[:12]}..., the manifest says {entry.sha256[:12]}...")
    if len(keys) != entry.samples:
        differences.append(f"{path}: {len(keys):,} samples, the manifest says {entry.samples:,}")
    if not offsets:
        return None
    expected = pack_offsets(offsets)
    if (index := _read(index_path(path), files, differences, limit=len(expected))) is not None and index != expected:
        differences.append(f"{index_path(path)}: is not the index of its tar")
    return keys


def _read(path: Path, files: Mapping[str, int], differences: list[str], limit: int = 0) -> bytes | None:
    """A file beside a shard, or None and a difference if it cannot be read; at most one byte more than `limit`."""
    if path.name not in files:
        differences.append(f"{path}: is missing")
        return None
    try:
        with path.open("rb") as file:
            return file.read(limit + 1) if limit else file.read()
    except storage_errors() as error:
        differences.append(f"{path}: cannot be read ({first_line(error)})")
        return None


class _Reader:
    """Reads and hashes a file from end to end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def take(self, count: int) -> bytes:
        """The next bytes."""
        data = self._file.read(count)
        self.bytes += len(data)
        self.sha256.update(data)
        return data

    def finish(self) -> bool:
        """Read to the end; returns whether there is anything but zeros."""
        nonzero = False
        while data := self.take(_CHUNK):
            nonzero = nonzero or bool(data.strip(b"\0"))
        return nonzero


def _beside(
    manifest: Manifest, entry: ShardEntry, keys: list[str] | None, files: Mapping[str, int], check: ShardCheck
) -> Iterator[str]:
    """Differences in the ledger, the references and the seal of a shard."""
    path = manifest.path(entry)
    ledger, references, seal = ledger_path(path), references_path(path), seal_path(path)
    if not manifest.plan and ledger.name not in files:
        return  # no crawl made this set
    unreadable: list[str] = []
    digests: dict[Path, str] = {}
    rows, referred, sealed = [], [], None
    try:
        if (data := _read(ledger, files, unreadable)) is not None:
            digests[ledger] = hashlib.sha256(data).hexdigest()
            rows = parse_ledger(data, ledger)
        if references.name in files and (data := _read(references, files, unreadable)) is not None:
            digests[references] = hashlib.sha256(data).hexdigest()
            referred = parse_references(data, references)
        if manifest.plan and (data := _read(seal, files, unreadable)) is not None:
            sealed = _parse_seal(data, seal)
    except DataError as error:
        yield str(error)
        return
    yield from unreadable
    if unreadable:
        return
    check.outcomes.update(row.kind for row in rows)
    check.references += [(reference.key, reference.same_as, reference.shard) for reference in referred]
    elsewhere = {reference.key for reference in referred}
    stored = [row.key for row in rows if row.kind == "ok" and row.key not in elsewhere]
    if keys is not None and stored != keys:
        yield f"{ledger}: has {len(stored):,} photos as ok, and they are not those of the shard"
    for reference in referred:
        yield from (f"{references}: {reference.key}: {error}" for error in _meta_errors(reference.key, reference.meta))
    if sealed:
        yield from _seal_differences(sealed, seal, entry, check, digests, ledger, references)


def _parse_seal(data: bytes, path: Path) -> Seal:
    try:
        return unpack_seal(data)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: broken seal ({error}); run the crawl of this set again") from None


def _seal_differences(
    sealed: Seal,
    path: Path,
    entry: ShardEntry,
    check: ShardCheck,
    digests: Mapping[Path, str],
    ledger: Path,
    references: Path,
) -> Iterator[str]:
    """Differences between a seal, the manifest's entry, and the files beside the shard."""
    if sealed.entry != entry and (sealed.entry.samples or entry.samples):
        yield f"{path}: is the seal of another shard than the one in {NAME}"
    if dict(sealed.outcomes) != dict(check.outcomes):
        yield f"{path}: has other outcomes than {ledger.name}"
    for file, digest in ((ledger, sealed.ledger_sha256), (references, sealed.references_sha256)):
        if digest and digests.get(file) != digest:
            yield f"{file}: has changed; its sha256 is not the one in {path.name}"


def _sample_errors(sample: Sample) -> Iterator[str]:
    errors = list(_meta_errors(sample.key, sample.meta))
    yield from errors
    if not errors and hashlib.sha256(sample.jpg).hexdigest() != sample.meta["sha256"]:
        yield "the photo is not the one that was stored"


def _meta_errors(key: str, meta: Mapping[str, object]) -> Iterator[str]:
    if {name: type(value) for name, value in meta.items()} != META:
        yield "its json member has wrong keys or types"
    elif meta["key"] != key:
        yield f"its json member has the key {meta['key']}"
