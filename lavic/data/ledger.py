"""What a shard's ledger tells those who only read: which photos are in the shard, without a look at each of them."""

from __future__ import annotations

import json
from pathlib import Path

from lavic.data.duplicates import read_references
from lavic.data.tar_shards import beside
from lavic.errors import DataError
from lavic.storage.paths import storage_errors


def ledger_path(shard: Path) -> Path:
    """Where a shard's ledger stands: `x-000000.tar` -> `x-000000.ledger.jsonl`."""
    return beside(shard, "ledger.jsonl")


def read_keys(shard: Path, samples: int) -> list[str] | None:
    """The keys of a shard's samples in order, by its ledger; see `read_digests`."""
    rows = read_digests(shard, samples)
    return None if rows is None else [key for key, _ in rows]


def read_digests(shard: Path, samples: int) -> list[tuple[str, str]] | None:
    """Key of each of a shard's samples and sha256 of the photo as it was received, in order, by its ledger.

    Args:
        shard: Where its tar stands.
        samples: How many it holds.

    Returns:
        The pairs; None where there is no ledger, or it does not tell of so many.
    """
    try:
        lines = ledger_path(shard).read_bytes().splitlines()
        stored = [(row["key"], row.get("sha256", "")) for row in map(json.loads, lines) if row["kind"] == "ok"]
        elsewhere = {reference.key for reference in read_references(shard)}
        rows = [row for row in stored if row[0] not in elsewhere]
    except storage_errors(ValueError, KeyError, TypeError, AttributeError, RecursionError, DataError):
        return None  # `lavic verify` says what is wrong
    return rows if len(rows) == samples else None
