"""`lavic verify`: re-read a set of shards, count it, hash it, and name every difference from what its manifest says."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np

from lavic.config.loader import Positional, parse, settings
from lavic.data.duplicates import ENDING, references_path
from lavic.data.manifest import NAME, SIZES, Manifest, ShardEntry
from lavic.errors import ConfigError, DataError, first_line
from lavic.shards.pack.existing_shard import places
from lavic.shards.plan.crawl_plan import FOLDER as PLAN
from lavic.shards.plan.external_dedup import mark_of
from lavic.shards.shard_check import ShardCheck, check_shard
from lavic.storage.atomic import write_whole
from lavic.storage.paths import place, sizes, storage_errors
from lavic.tracking.progress import progress_bar

DESCRIPTION = """Re-read a set of shards and compare it with its manifest.

Checked: every shard's size and sha256, its index, every sample's members, keys, json and photo hash, that no key
occurs twice in the set, that no tar stands beside those of the manifest, and that there is a ledger and a seal for
every shard: the ledger names exactly the photos that are there, all ledgers together have the outcomes that the
manifest has. Every difference is a line that names its file; exit code 1 if there is one. A shard that differs is made
again by removing it and running its crawl again. A folder of sets, as `lavic crawl --splits` makes it, is checked set
by set.
"""

_LEDGER = ".ledger.jsonl"


@settings
class Settings:
    """Re-read a set of shards, count and hash it."""

    folder: Annotated[str, Positional]
    """Folder of the set, or of several sets, or an address such as s3://bucket/prefix."""
    receipt: Path | None = None
    """A file to write when nothing differs: it names the manifest that the set was compared with."""


SETTINGS = Settings
"""The command's settings, for `lavic.cli.settings_class`."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 1 where anything differs."""
    chosen = parse(Settings, argv, command="verify", description=DESCRIPTION)
    folders = _sets_in(place(chosen.folder))
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
        write_whole(receipt, json.dumps({"manifest": manifest.digest}) + "\n")
    return 0


def verify(manifest: Manifest) -> list[str]:
    """Every difference between a set and its manifest, as a line of text; empty when there is none."""
    files = sizes(manifest.folder)
    looks: dict[str, ShardCheck] = {}
    entries = [
        *manifest.shards,
        *(ShardEntry(name=name, samples=0, bytes=0, sha256="") for name in _without(manifest, files)),
    ]
    with progress_bar(manifest.samples, "photos") as bar, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        seen = pool.map(lambda entry: check_shard(manifest, entry, files), entries)
        for entry, look in zip(entries, seen, strict=True):
            bar.update(look.samples)
            looks[entry.name] = look
    differences = [line for look in looks.values() for line in look.differences]
    for lines in (_repeated, _referred, _outcomes):
        differences += lines(manifest, looks)
    return [*differences, *_strays(manifest, files), *_sizes(manifest)]


def _without(manifest: Manifest, files: Mapping[str, int]) -> list[str]:
    """Names of the shards without a photo: those that the manifest has, and those that have a ledger alone."""
    named = {shard.name for shard in manifest.shards}
    ledgers = {f"{name.removesuffix(_LEDGER)}.tar" for name in files if name.endswith(_LEDGER)}
    return sorted({*manifest.empty, *ledgers} - named)


def _repeated(manifest: Manifest, looks: Mapping[str, ShardCheck]) -> Iterator[str]:
    """Keys that occur twice: their marks are sorted first, and only those that repeat are looked at as text."""
    every = np.sort(np.concatenate([np.empty(0, "<u8"), *(look.numbers for look in looks.values())]))
    twice = np.unique(every[1:][every[1:] == every[:-1]])
    seen: dict[str, str] = {}
    for name, look in looks.items() if len(twice) else ():
        if not np.isin(look.numbers, twice).any():
            continue
        with (manifest.folder / name).open("rb") as file:
            for key, _ in places(file):
                if np.frombuffer(mark_of(key), "<u8")[0] not in twice:
                    continue
                if key in seen:
                    yield f"{manifest.folder / name}: key {key} is in {seen[key]} too"
                seen.setdefault(key, name)


def _referred(manifest: Manifest, looks: Mapping[str, ShardCheck]) -> Iterator[str]:
    """References to photos that are not there."""
    count = sum(len(look.references) for look in looks.values())
    if count != manifest.references:
        yield f"{manifest.folder}: {count:,} references, {NAME} says {manifest.references:,}"
    by_owner: dict[str, list[tuple[str, str, str]]] = {}
    for name, look in looks.items():
        for key, same_as, owner in look.references:
            by_owner.setdefault(owner, []).append((name, key, same_as))
    for owner, references in by_owner.items():
        marks = np.frombuffer(b"".join(mark_of(same_as) for _, _, same_as in references), "<u8")
        there = np.isin(marks, looks[owner].numbers) if owner in looks else np.zeros(len(marks), bool)
        for (name, key, same_as), is_there in zip(references, there, strict=True):
            if not is_there:
                sidecar = references_path(manifest.folder / name)
                yield f"{sidecar}: {key} refers to {same_as}, which is not in {owner}"


def _outcomes(manifest: Manifest, looks: Mapping[str, ShardCheck]) -> Iterator[str]:
    """The ledgers of a set that was crawled, those of shards without a photo included, have every planned photo."""
    outcomes: Counter[str] = Counter()
    for look in looks.values():
        outcomes.update(look.outcomes)
    if manifest.plan and outcomes != Counter(manifest.outcomes):
        expected = ", ".join(f"{kind} {count:,}" for kind, count in sorted(manifest.outcomes.items()))
        found = ", ".join(f"{kind} {count:,}" for kind, count in sorted(outcomes.items())) or "nothing"
        yield f"{manifest.folder}: the ledgers have {found}; {NAME} says {expected}"


def _strays(manifest: Manifest, files: Mapping[str, int]) -> Iterator[str]:
    known = {*(shard.name for shard in manifest.shards), *manifest.empty}
    for name in sorted(files):
        if name.endswith(".tar") and name not in known:
            yield f"{manifest.folder / name}: is not in the manifest, and readers that take *.tar would read it"
        shard = name.removesuffix(f".{ENDING}")
        if shard != name and f"{shard}.tar" not in known and f"{shard}{_LEDGER}" not in files:
            yield f"{manifest.folder / name}: is beside no shard"


def _sizes(manifest: Manifest) -> Iterator[str]:
    path = manifest.folder / SIZES
    try:
        found = path.read_bytes()
    except storage_errors() as error:
        yield f"{path}: cannot be read ({first_line(error)})"
        return
    if found != manifest.sizes_text().encode():
        yield f"{path}: does not agree with {NAME}"
