"""Teacher descriptions: one sidecar per shard, joined to its samples by key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lavic.data.tar_shards import beside
from lavic.errors import DataError
from lavic.storage.atomic import atomic_write

ORIGIN = ("model", "weights", "prompt", "views", "dtype", "max_new_tokens", "sampling")
"""What a description depends on: the model that wrote it, that model's fingerprint, the version of its prompt, how the
photo was cut (`five` or `lavic`; `whole` for an endpoint), the precision of the model, the longest description that it
was allowed, how its words were drawn."""
FIELDS = ("key", "text", *ORIGIN, "flag")
"""Of a row: sample, its description, `ORIGIN`, and what is wrong with the description, empty for nothing."""
DEFAULTS = {"views": "five", "dtype": "", "max_new_tokens": "", "sampling": "greedy", "flag": ""}
"""Of fields that rows written before them lack; empty: not known."""


def descriptions_path(shard: Path) -> Path:
    """Where a shard's descriptions stand: `x-000000.tar` -> `x-000000.descriptions.jsonl`."""
    return beside(shard, "descriptions.jsonl")


def read_descriptions(shard: Path) -> dict[str, str]:
    """Text by sample key; empty where the shard has no sidecar.

    Raises:
        DataError: A line is not a description.
    """
    return {row["key"]: row["text"] for row in read_rows(shard)}


def described_by(shard: Path) -> list[dict[str, str]]:
    """What wrote a shard's sidecar: the fields of `ORIGIN`, each combination once, sorted."""
    origins = {tuple(row[name] for name in ORIGIN) for row in read_rows(shard)}
    return [dict(zip(ORIGIN, values, strict=True)) for values in sorted(origins)]


def read_rows(shard: Path) -> Iterator[dict[str, str]]:
    """The rows of a shard's sidecar with all fields; none where the shard has no sidecar.

    Raises:
        DataError: A line is not a description.
    """
    path = descriptions_path(shard)
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            yield parse_description(line, path, number)


def parse_description(line: bytes, path: Path, number: int) -> dict[str, str]:
    """One line of a sidecar: all fields of `FIELDS`.

    Raises:
        DataError: It is not a description; `path` and `number` say where.
    """
    try:
        row = {**DEFAULTS, **json.loads(line)}
        return {name: str(row[name]) for name in FIELDS}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}:{number}: not a description; remove the file and describe again") from None


def write_descriptions(shard: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write a shard's sidecar whole; each row has the fields of `FIELDS`, or not those of `DEFAULTS`."""
    lines = []
    for row in ({**DEFAULTS, **row} for row in rows):
        assert set(row) == set(FIELDS), f"a description has the fields {FIELDS}, not {tuple(row)}"
        lines.append(json.dumps({name: row[name] for name in FIELDS}, ensure_ascii=False) + "\n")
    atomic_write(descriptions_path(shard), "".join(lines))
