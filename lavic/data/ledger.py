"""A shard's ledger as readers need it: which photos are in the shard, without reading the tar."""

from __future__ import annotations

import json
from pathlib import Path

from lavic.data.duplicates import read_references
from lavic.data.tar_shards import sidecar_path
from lavic.errors import DataError
from lavic.storage.paths import storage_errors


def ledger_path(shard: Path) -> Path:
    """The path of a shard's ledger: `x-000000.tar` -> `x-000000.ledger.jsonl`."""
    return sidecar_path(shard, "ledger.jsonl")


def read_digests(shard: Path, samples: int) -> list[tuple[str, str]] | None:
    """The key of each of a shard's samples and the sha256 of the photo as received, in order, from its ledger.

    None if the ledger is missing or broken, or has another number of stored photos than `samples`.
    """
    try:
        lines = ledger_path(shard).read_bytes().splitlines()
        received = [(row["key"], row.get("sha256", "")) for row in map(json.loads, lines) if row["kind"] == "ok"]
        duplicates = {reference.key for reference in read_references(shard)}
        stored = [row for row in received if row[0] not in duplicates]
    except storage_errors(ValueError, KeyError, TypeError, AttributeError, RecursionError, DataError):
        return None  # `lavic verify` reports what is wrong
    return stored if len(stored) == samples else None
