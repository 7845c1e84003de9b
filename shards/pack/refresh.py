"""`lavic crawl --refresh`: requests stored photos again and replaces those that have changed.

OUT/.refresh holds the name of the running refresh, and each shard's seal that of its last one, so that the same command
continues an interrupted refresh. The file is removed when the set is complete; then the next refresh starts.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from lavic.shards.pack.outcomes import Outcome
from lavic.storage.atomic import atomic_write

FILE = ".refresh"

CHANGED, UNCHANGED, KEPT = "changed", "unchanged", "kept"
"""Results of a stored photo; one that can no longer be fetched is kept."""


def begin_refresh(folder: Path) -> str:
    """The name of a folder's running refresh, or of a new one."""
    path = folder / FILE
    if path.exists() and (name := path.read_text("utf-8").strip()):
        return name
    name = uuid.uuid4().hex[:16]
    atomic_write(path, name + "\n")
    return name


def end_refresh(folder: Path) -> None:
    """Ends a folder's running refresh."""
    (folder / FILE).unlink(missing_ok=True)


def conditional_headers(row: Outcome) -> dict[str, str]:
    """Headers that request a photo only if it has changed; none if its server sent no validator."""
    headers = {"If-None-Match": row.etag, "If-Modified-Since": row.last_modified}
    return {name: value for name, value in headers.items() if value}


def refreshed(stored: Outcome, new: Outcome) -> tuple[str, Outcome]:
    """The result of a stored photo, and its new row; `new` is the row of the new response by itself."""
    if new.kind != "ok":
        return KEPT, replace(stored, refresh_failed=f"{new.kind}: {new.reason}")
    if new.http == 304:
        return UNCHANGED, replace(stored, refresh_failed="")
    if new.sha256 == stored.sha256:
        return UNCHANGED, replace(stored, etag=new.etag, last_modified=new.last_modified, refresh_failed="")
    return CHANGED, new


def with_validators_of(row: Outcome, other: Outcome) -> Outcome:
    """A stored photo's row after a refresh of another photo, which shows the same picture."""
    return replace(row, etag=other.etag, last_modified=other.last_modified, refresh_failed=other.refresh_failed)


def refresh_line(shards: Iterable[Mapping[str, int]]) -> str:
    """A summary of a refresh, from the counts of its shards; empty if there was none."""
    total: Counter[str] = Counter()
    for counts in shards:
        total.update(counts)
    if not total:
        return ""
    line = f"refreshed: {total[UNCHANGED]:,} photos unchanged, {total[CHANGED]:,} changed"
    if total[KEPT]:
        line += f", {total[KEPT]:,} could not be fetched again and were kept (see refresh_failed in the ledger)"
    return line
