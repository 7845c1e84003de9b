"""`lavic verify`: re-read a set of shards, count it, hash it, and name every difference from what its manifest says."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from lavic.config import Positional, parse, settings
from lavic.data.manifest import NAME, SIZES, Manifest, ShardEntry
from lavic.data.shards import META, index_path, parse_sample
from lavic.errors import DataError
from lavic.shards.outcomes import read_ledger

DESCRIPTION = """Re-read a set of shards and compare it with its manifest.

Checked: every shard's size and sha256, its index, every sample's members, keys, json and photo hash, that no key
occurs twice in the set, and that the ledgers name exactly the photos that are there. Every difference is a line; exit
code 1 if there is one. A shard that differs is made again by removing it and running its crawl again.
"""


@settings
class Settings:
    """Re-read a set of shards, count and hash it."""

    folder: Annotated[Path, Positional]
    """Folder of the set."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 1 where anything differs."""
    chosen = parse(Settings, argv, command="verify", description=DESCRIPTION)
    manifest = Manifest.load(chosen.folder, check=False)
    differences = verify(manifest)
    for line in differences:
        print(line)
    if differences:
        print(f"{chosen.folder}: {len(differences)} differences")
        return 1
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    count = f"{manifest.samples:,} photos in {len(manifest.shards):,} shards"
    print(f"{chosen.folder}: {count}, {size:,.1f} MB, all as the manifest says")
    return 0


def verify(manifest: Manifest) -> list[str]:
    """Every difference between a set and its manifest, as a line of text; empty when there is none."""
    differences: list[str] = []
    seen: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for shard, (keys, found) in zip(
            manifest.shards, pool.map(lambda s: _verify_shard(manifest, s), manifest.shards), strict=True
        ):
            differences += found
            for key in keys:
                if key in seen:
                    differences.append(f"{manifest.path(shard)}: key {key} is in {seen[key]} too")
                seen.setdefault(key, shard.name)
    return differences + list(_sizes(manifest))


def _verify_shard(manifest: Manifest, entry: ShardEntry) -> tuple[list[str], list[str]]:
    """Keys of a shard and its differences."""
    path = manifest.path(entry)
    try:
        data = path.read_bytes()
    except OSError as error:
        return [], [f"{path}: cannot be read ({error.strerror})"]
    found = []
    if len(data) != entry.bytes:
        found.append(f"{path}: {len(data):,} bytes, the manifest says {entry.bytes:,}")
    if (digest := hashlib.sha256(data).hexdigest()) != entry.sha256:
        found.append(f"{path}: sha256 {digest[:12]}..., the manifest says {entry.sha256[:12]}...")
    keys: list[str] = []
    try:
        offsets = _offsets(path)
        for start, end in pairwise(offsets):
            sample = parse_sample(data[start:end], f"{path} at byte {start}")
            keys.append(sample.key)
            found += [f"{path}: {sample.key}: {what}" for what in _wrong(sample.key, sample.meta, sample.jpg)]
        if data[offsets[-1] :].strip(b"\0"):
            found.append(f"{path}: more samples than its index has")
        if len(keys) != entry.samples:
            found.append(f"{path}: {len(keys):,} samples, the manifest says {entry.samples:,}")
        ledger = [row.key for row in read_ledger(path) if row.kind == "ok"]
        if ledger and ledger != keys:
            found.append(f"{path}: its ledger has {len(ledger):,} photos as ok, and they are not those of the shard")
    except DataError as error:
        found.append(str(error))
    return keys, found


def _offsets(shard: Path) -> Sequence[int]:
    path = index_path(shard)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
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
        sizes = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        yield f"{path}: cannot be read ({error})"
        return
    if sizes != {shard.name: shard.samples for shard in manifest.shards}:
        yield f"{path}: does not agree with {NAME}"
