"""`lavic verify`: reads a set of shards again and prints every difference from its manifest."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np

from lavic.config import Positional, parse, settings
from lavic.data.duplicates import ENDING, references_path
from lavic.data.manifest import NAME, SIZES, Manifest, ShardEntry, digest_manifest
from lavic.data.tar_shards import sample_ranges
from lavic.errors import ConfigError, DataError, first_line
from lavic.shards.plan.crawl_plan import FOLDER as PLAN
from lavic.shards.plan.external_dedup import hash64
from lavic.shards.shard_check import ShardCheck, check_shard
from lavic.storage import format_bytes
from lavic.storage.atomic import atomic_write
from lavic.storage.paths import as_path, file_sizes, storage_errors
from lavic.tracking.progress import progress_bar

DESCRIPTION = """Read a set of shards again and compare it with its manifest.

It checks every shard's size, sha256 and index; every sample's members, keys, json and photo hash; that no key occurs
twice in the set and no other tar is in the folder; and that every shard has a seal and a ledger with exactly its
photos, all of them with the outcomes of the manifest. Every difference is printed on a line with its file, and the exit
code is 1. To repair a shard, remove it and run its crawl again. A folder of sets, as `lavic crawl --splits` makes it,
is checked set by set.
"""

_LEDGER = ".ledger.jsonl"


@settings
class Settings:
    """Read a set of shards again and compare it with its manifest."""

    folder: Annotated[str, Positional]
    """Folder of the set, or of several sets, or a URI such as s3://bucket/prefix."""
    receipt: Path | None = None
    """File to write if nothing differs, with the digest of the manifest."""


SETTINGS = Settings
resolve = partial(parse, Settings, command="verify", description=DESCRIPTION)
"""The settings of a command line; see `lavic.cli.command_module`."""


def is_complete(settings: Settings) -> bool:
    """Whether the receipt names the manifest that the set has now: a crawl that went on writes another one."""
    if settings.receipt is None:
        return False
    try:
        verified: str = json.loads(settings.receipt.read_text("utf-8"))["manifest"]
        return verified == digest_manifest(as_path(settings.folder))
    except (OSError, DataError, ValueError, KeyError, TypeError):
        return False


def estimate(settings: Settings) -> str:
    """How much will be read, as text; empty where the set is not there yet."""
    try:
        shards = Manifest.load(settings.folder, check=False).shards
    except DataError:
        return ""
    return f"bytes: {format_bytes(sum(shard.bytes for shard in shards))} to read"


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 1 where anything differs."""
    chosen = resolve(argv)
    folders = _sets_in(as_path(chosen.folder))
    if chosen.receipt:
        if len(folders) > 1:
            raise ConfigError(
                f"--receipt is for one set, and {chosen.folder} holds {len(folders)}; verify each of them"
            )
        chosen.receipt.unlink(missing_ok=True)
    if len(folders) == 1:
        return _verify_set(folders[0], chosen.receipt)
    code = 0
    for folder in folders:
        try:
            code = max(code, _verify_set(folder))
        except DataError as error:
            print(error)
            code = 1
    return code


def _sets_in(folder: Path) -> list[Path]:
    """The folder itself, or where it holds no set but folders of sets, these."""
    try:
        if (folder / NAME).exists() or (folder / PLAN).exists() or not folder.is_dir():
            return [folder]
        inner = sorted(path for path in folder.iterdir() if (path / NAME).exists() or (path / PLAN).exists())
    except storage_errors() as error:
        raise DataError(f"{folder}: cannot be read ({first_line(error)})") from None
    return inner or [folder]


def _verify_set(folder: Path, receipt: Path | None = None) -> int:
    manifest = Manifest.load(folder, check=False)
    differences = verify(manifest)
    for line in differences:
        print(line)
    if differences:
        print(f"{folder}: {len(differences):,} differences")
        return 1
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    count = f"{manifest.samples:,} photos in {len(manifest.shards):,} shards"
    print(f"{folder}: {count}, {size:,.1f} MB, all as the manifest says")
    if receipt:
        atomic_write(receipt, json.dumps({"manifest": manifest.digest}) + "\n")
    return 0


def verify(manifest: Manifest) -> list[str]:
    """Every difference between a set and its manifest, as a line of text; empty when there is none."""
    files = file_sizes(manifest.folder)
    checks: dict[str, ShardCheck] = {}
    entries = [
        *manifest.shards,
        *(ShardEntry(name=name, samples=0, bytes=0, sha256="") for name in _shards_without_photo(manifest, files)),
    ]
    with progress_bar(manifest.samples, "photos") as bar, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = pool.map(lambda entry: check_shard(manifest, entry, files), entries)
        for entry, check in zip(entries, results, strict=True):
            bar.update(check.samples)
            checks[entry.name] = check
    differences = [line for check in checks.values() for line in check.differences]
    for compare in (_repeated_keys, _missing_owners, _outcomes):
        differences += compare(manifest, checks)
    return [*differences, *_strays(manifest, files), *_sizes(manifest)]


def _shards_without_photo(manifest: Manifest, files: Mapping[str, int]) -> list[str]:
    """Names of the shards without a photo: those of the manifest, and those with a ledger alone."""
    named = {shard.name for shard in manifest.shards}
    ledgers = {f"{name.removesuffix(_LEDGER)}.tar" for name in files if name.endswith(_LEDGER)}
    return sorted({*manifest.empty, *ledgers} - named)


def _repeated_keys(manifest: Manifest, checks: Mapping[str, ShardCheck]) -> Iterator[str]:
    """Keys that occur twice: their hashes are sorted, and only those that repeat are compared as text."""
    hashes = np.sort(np.concatenate([np.empty(0, "<u8"), *(check.key_hashes for check in checks.values())]))
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    shard_of_key: dict[str, str] = {}
    for name, check in checks.items() if len(repeated) else ():
        if not np.isin(check.key_hashes, repeated).any():
            continue
        with (manifest.folder / name).open("rb") as file, suppress(DataError):
            for key, _, _ in sample_ranges(file, name):
                if np.frombuffer(hash64(key), "<u8")[0] not in repeated:
                    continue
                if key in shard_of_key:
                    yield f"{manifest.folder / name}: key {key} is in {shard_of_key[key]} too"
                shard_of_key.setdefault(key, name)


def _missing_owners(manifest: Manifest, checks: Mapping[str, ShardCheck]) -> Iterator[str]:
    """References to photos that do not exist."""
    count = sum(len(check.references) for check in checks.values())
    if count != manifest.references:
        yield f"{manifest.folder}: {count:,} references, {NAME} has {manifest.references:,}"
    by_owner: dict[str, list[tuple[str, str, str]]] = {}
    for name, check in checks.items():
        for key, same_as, owner in check.references:
            by_owner.setdefault(owner, []).append((name, key, same_as))
    for owner, references in by_owner.items():
        hashes = np.frombuffer(b"".join(hash64(same_as) for _, _, same_as in references), "<u8")
        exist = np.isin(hashes, checks[owner].key_hashes) if owner in checks else np.zeros(len(hashes), bool)
        for (name, key, same_as), exists in zip(references, exist, strict=True):
            if not exists:
                sidecar = references_path(manifest.folder / name)
                yield f"{sidecar}: {key} refers to {same_as}, which is not in {owner}"


def _outcomes(manifest: Manifest, checks: Mapping[str, ShardCheck]) -> Iterator[str]:
    """Whether the ledgers of a crawled set, those of shards without a photo included, have every planned photo."""
    outcomes: Counter[str] = Counter()
    for check in checks.values():
        outcomes.update(check.outcomes)
    if manifest.plan and outcomes != Counter(manifest.outcomes):
        expected = ", ".join(f"{kind} {count:,}" for kind, count in sorted(manifest.outcomes.items()))
        actual = ", ".join(f"{kind} {count:,}" for kind, count in sorted(outcomes.items())) or "nothing"
        yield f"{manifest.folder}: the ledgers have {actual}; {NAME} has {expected}"


def _strays(manifest: Manifest, files: Mapping[str, int]) -> Iterator[str]:
    known = {*(shard.name for shard in manifest.shards), *manifest.empty}
    for name in sorted(files):
        if name.endswith(".tar") and name not in known:
            yield f"{manifest.folder / name}: is not in the manifest, but readers of *.tar would read it"
        shard = name.removesuffix(f".{ENDING}")
        if shard != name and f"{shard}.tar" not in known and f"{shard}{_LEDGER}" not in files:
            yield f"{manifest.folder / name}: belongs to no shard"


def _sizes(manifest: Manifest) -> Iterator[str]:
    path = manifest.folder / SIZES
    try:
        data = path.read_bytes()
    except storage_errors() as error:
        yield f"{path}: cannot be read ({first_line(error)})"
        return
    if data != manifest.sizes_text().encode():
        yield f"{path}: does not agree with {NAME}"
