"""`lavic crawl --refresh`: stored photos are asked for again, and those that have changed are stored anew.

OUT/.refresh names a refresh that has begun, and the seal of each shard names the last one it went through. So the same
command goes on where it stopped, and the next refresh begins anew, since the file goes when the set is whole.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from lavic.shards.pack.outcomes import Outcome
from lavic.storage.atomic import write_whole

FILE = ".refresh"

CHANGED, UNCHANGED, KEPT = "changed", "unchanged", "kept"
"""What a refresh makes of a stored photo; one that could not be had again is kept."""


def begin(folder: Path) -> str:
    """The name of the refresh that a folder is in, a new one if it is in none."""
    path = folder / FILE
    if path.exists() and (name := path.read_text("utf-8").strip()):
        return name
    name = uuid.uuid4().hex[:16]
    write_whole(path, name + "\n")
    return name


def end(folder: Path) -> None:
    """The refresh is done."""
    (folder / FILE).unlink(missing_ok=True)


def conditions_of(row: Outcome) -> dict[str, str]:
    """Headers that ask for a photo only if it has changed; none if its server sent nothing to tell by."""
    found = {"If-None-Match": row.etag, "If-Modified-Since": row.last_modified}
    return {name: value for name, value in found.items() if value}


def refreshed(stored: Outcome, fresh: Outcome) -> tuple[str, Outcome]:
    """What became of a stored photo, and its row, by the row that its new answer would have as a first one."""
    if fresh.kind != "ok":
        return KEPT, replace(stored, refresh_failed=f"{fresh.kind}: {fresh.reason}")
    if fresh.http == 304:
        return UNCHANGED, replace(stored, refresh_failed="")
    if fresh.sha256 == stored.sha256:
        return UNCHANGED, replace(stored, etag=fresh.etag, last_modified=fresh.last_modified, refresh_failed="")
    return CHANGED, fresh


def refresh_line(shards: Iterable[Mapping[str, int]]) -> str:
    """What a refresh made of the photos, from the counts of its shards; empty where there was none."""
    total: Counter[str] = Counter()
    for counts in shards:
        total.update(counts)
    if not total:
        return ""
    line = f"refreshed: {total[UNCHANGED]:,} photos unchanged, {total[CHANGED]:,} changed"
    if total[KEPT]:
        line += f", {total[KEPT]:,} could not be had again and were kept (refresh_failed in the ledger says why)"
    return line
