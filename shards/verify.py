"""`lavic verify`: re-read a set of shards, count it, hash it, and name every difference from what its manifest says."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np

from lavic.config import Positional, parse, settings
from lavic.data.atomic import write_whole
from lavic.data.ledger import ledger_path
from lavic.data.manifest import NAME, SIZES, Manifest, ShardEntry, digest_manifest
from lavic.data.place import sizes, storage_errors
from lavic.data.references import read_all_references, read_references
from lavic.data.shards import META, index_path, parse_sample
from lavic.errors import DataError, first_line
from lavic.shards.outcomes import read_ledger
from lavic.shards.progress import Progress
from lavic.shards.repeats import mark_of

DESCRIPTION = """Re-read a set of shards and compare it with its manifest.

Checked: every shard's size and sha256, its index, every sample's members, keys, json and photo hash, that no key
occurs twice in the set, that no tar stands beside those of the manifest, and that there is a ledger for every shard,
naming exactly the photos that are there, all of them together with the outcomes that the manifest has. Every difference
is a line; exit code 1 if there is one. A shard that differs is made again by removing it and running its crawl again.
"""

_LEDGER = ".ledger.jsonl"
_TAIL = 8 << 20


@settings
class Settings:
    """Re-read a set of shards, count and hash it."""

    folder: Annotated[str, Positional]
    """Folder of the set, or an address such as s3://bucket/prefix."""
    receipt: Path | None = None
    """A file to write when nothing differs: it names the manifest that the set was compared with."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 1 where anything differs."""
    chosen = parse(Settings, argv, command="verify", description=DESCRIPTION)
    manifest = Manifest.load(chosen.folder, check=False)
    digest = digest_manifest(manifest.folder)
    if chosen.receipt:
        chosen.receipt.unlink(missing_ok=True)
    differences = verify(manifest)
    for line in differences:
        print(line)
    if differences:
        print(f"{chosen.folder}: {len(differences)} differences")
        return 1
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    count = f"{manifest.samples:,} photos in {len(manifest.shards):,} shards"
    print(f"{chosen.folder}: {count}, {size:,.1f} MB, all as the manifest says")
    if chosen.receipt:
        write_whole(chosen.receipt, json.dumps({"manifest": digest}) + "\n")
    return 0


def verify(manifest: Manifest) -> list[str]:
    """Every difference between a set and its manifest, as a line of text; empty when there is none."""
    differences: list[str] = []
    marks: list[np.ndarray] = []
    with Progress(manifest.samples) as progress, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for number, look in enumerate(pool.map(lambda shard: _look_at(manifest, shard), manifest.shards)):
            progress.add(number, {"ok": look.samples}, began=look.began)
            differences += look.differences
            marks.append(np.frombuffer(look.marks, "<u8"))
    beside = (_repeated(manifest, marks), _referred(manifest, marks), _ledgers(manifest), _strays(manifest))
    return [*differences, *(line for lines in beside for line in lines), *_sizes(manifest)]


@dataclass
class _Look:
    """What was seen of a shard. Of its keys eight bytes each: there may be millions."""

    differences: list[str] = field(default_factory=list)
    marks: bytearray = field(default_factory=bytearray)
    samples: int = 0
    began: float = field(default_factory=time.time)


def _look_at(manifest: Manifest, entry: ShardEntry) -> _Look:
    path, look = manifest.path(entry), _Look()
    found, keys = look.differences, []
    try:
        with path.open("rb") as file:
            reader = _Reader(file)
            try:
                for sample_at in pairwise(_offsets(path)):
                    sample = parse_sample(reader.take(sample_at[1] - sample_at[0]), f"{path} at byte {sample_at[0]}")
                    keys.append(sample.key)
                    look.marks += mark_of(sample.key)
                    found += [f"{path}: {sample.key}: {what}" for what in _wrong(sample.key, sample.meta, sample.jpg)]
                if reader.rest():
                    found.append(f"{path}: more samples than its index has")
            except DataError as error:
                found.append(str(error))
            reader.rest()
    except storage_errors() as error:
        look.differences.append(f"{path}: cannot be read ({first_line(error)})")
        return look
    look.samples = len(keys)
    if reader.bytes != entry.bytes:
        found.append(f"{path}: {reader.bytes:,} bytes, the manifest says {entry.bytes:,}")
    if (digest := reader.sha256.hexdigest()) != entry.sha256:
        found.append(f"{path}: sha256 {digest[:12]}..., the manifest says {entry.sha256[:12]}...")
    if len(keys) != entry.samples:
        found.append(f"{path}: {len(keys):,} samples, the manifest says {entry.samples:,}")
    found += _against_ledger(manifest, path, keys)
    return look


class _Reader:
    """Reads a file once from end to end, and hashes it on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def take(self, count: int) -> bytes:
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


def _against_ledger(manifest: Manifest, path: Path, keys: list[str]) -> Iterator[str]:
    try:
        elsewhere = {one.key for one in read_references(path)}
        ledger = [row.key for row in read_ledger(path) if row.kind == "ok" and row.key not in elsewhere]
    except storage_errors(DataError) as error:
        yield str(error)
        return
    if ledger != keys and (ledger or manifest.plan):
        yield f"{path}: its ledger has {len(ledger):,} photos as ok, and they are not those of the shard"


def _repeated(manifest: Manifest, marks: Sequence[np.ndarray]) -> Iterator[str]:
    """Keys that occur twice: their marks are sorted first, and only those that repeat are looked at as text."""
    every = np.sort(np.concatenate([np.empty(0, "<u8"), *marks]))
    twice = np.unique(every[1:][every[1:] == every[:-1]])
    seen: dict[str, str] = {}
    for shard, own in zip(manifest.shards, marks, strict=True) if len(twice) else ():
        if not np.isin(own, twice).any():
            continue
        with manifest.path(shard).open("rb") as file:
            for start in _offsets(manifest.path(shard))[:-1]:
                file.seek(start)
                key = file.read(100).partition(b".")[0].decode("utf-8", "replace")
                if np.frombuffer(mark_of(key), "<u8")[0] not in twice:
                    continue
                if key in seen:
                    yield f"{manifest.path(shard)}: key {key} is in {seen[key]} too"
                seen.setdefault(key, shard.name)


def _referred(manifest: Manifest, marks: Sequence[np.ndarray]) -> Iterator[str]:
    """References to photos that are not there."""
    try:
        references = read_all_references(manifest.folder)
    except storage_errors(DataError) as error:
        yield str(error)
        return
    if len(references) != manifest.references:
        yield f"{manifest.folder}: {len(references):,} references, the manifest says {manifest.references:,}"
    stored = {shard.name: set(own.tolist()) for shard, own in zip(manifest.shards, marks, strict=True) if references}
    for one in references:
        if int(np.frombuffer(mark_of(one.same_as), "<u8")[0]) not in stored.get(one.shard, ()):
            yield f"{manifest.folder}: {one.key} refers to {one.same_as}, which is not in {one.shard}"


def _ledgers(manifest: Manifest) -> Iterator[str]:
    """A set that was crawled has a ledger for every shard, those without a photo included."""
    if not manifest.plan:
        return
    outcomes: Counter[str] = Counter()
    there = [name for name in sizes(manifest.folder) if name.endswith(_LEDGER)]
    for shard in manifest.shards:
        if ledger_path(manifest.path(shard)).name not in there:
            yield f"{ledger_path(manifest.path(shard))}: is missing"
    for name in there:
        try:
            outcomes.update(row.kind for row in read_ledger(manifest.folder / f"{name.removesuffix(_LEDGER)}.tar"))
        except storage_errors(DataError) as error:
            yield str(error)
    if outcomes != Counter(manifest.outcomes):
        said_there = ", ".join(f"{kind} {count:,}" for kind, count in sorted(manifest.outcomes.items()))
        found = ", ".join(f"{kind} {count:,}" for kind, count in sorted(outcomes.items())) or "nothing"
        yield f"{manifest.folder}: the ledgers have {found}; the manifest says {said_there}"


def _strays(manifest: Manifest) -> Iterator[str]:
    known = {shard.name for shard in manifest.shards}
    for name in sorted(sizes(manifest.folder)):
        if name.endswith(".tar") and name not in known:
            yield f"{manifest.folder / name}: is not in the manifest, and readers that take *.tar would read it"


def _offsets(shard: Path) -> Sequence[int]:
    path = index_path(shard)
    try:
        data = path.read_bytes()
    except storage_errors() as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from None
    if not data or len(data) % 8:
        raise DataError(f"{path}: not an index")
    offsets = struct.unpack(f"<{len(data) // 8}Q", data)
    if list(offsets) != sorted(offsets) or offsets[0] != 0:
        raise DataError(f"{path}: not an index: its offsets do not rise from 0")
    return offsets


def _wrong(key: str, meta: dict[str, object], jpg: bytes) -> Iterator[str]:
    if {name: type(value) for name, value in meta.items()} != META:
        yield "its json member has other keys or types than it should"
    elif meta["key"] != key:
        yield f"its json member says {meta['key']}"
    elif hashlib.sha256(jpg).hexdigest() != meta["sha256"]:
        yield "the photo is not the one that was stored"


def _sizes(manifest: Manifest) -> Iterator[str]:
    path = manifest.folder / SIZES
    try:
        found = json.loads(path.read_text("utf-8"))
    except storage_errors(ValueError) as error:
        yield f"{path}: cannot be read ({first_line(error)})"
        return
    if found != {shard.name: shard.samples for shard in manifest.shards}:
        yield f"{path}: does not agree with {NAME}"
