"""The teacher's descriptions: one sidecar per shard, joined to its samples by key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lavic.data.tar_shards import sidecar_path
from lavic.errors import DataError
from lavic.storage.atomic import atomic_write

ORIGIN = ("model", "weights", "prompt", "views", "dtype", "max_new_tokens", "sampling")
"""What a description depends on: the model, the fingerprint of its weights, the version of its prompt, the tiling of
the photo (`five` or `lavic`; `whole` for an endpoint), the model's precision, the maximum length, the sampling."""
FIELDS = ("key", "text", *ORIGIN, "flag", "source_sha256")
"""Fields of a row: the sample's key, its description, `ORIGIN`, what is wrong with the description, or "", and the
sha256 of the photo as received, since `lavic crawl --refresh` may store another one under the key."""
DEFAULTS = {"views": "five", "dtype": "", "max_new_tokens": "", "sampling": "greedy", "flag": "", "source_sha256": ""}
"""Values of fields that rows of older versions lack; "" if unknown."""


def descriptions_path(shard: Path) -> Path:
    """The path of a shard's descriptions: `x-000000.tar` -> `x-000000.descriptions.jsonl`."""
    return sidecar_path(shard, "descriptions.jsonl")


def read_descriptions(shard: Path) -> dict[str, str]:
    """Text by sample key; empty without a sidecar. Raises DataError as `parse_description`."""
    return {row["key"]: row["text"] for row in read_rows(shard)}


def is_of_photo(row: Mapping[str, str], source_sha256: str) -> bool:
    """Whether a row describes the photo with this sha256; true for rows that do not say."""
    return row["source_sha256"] in ("", source_sha256)


def described_by(shard: Path) -> list[dict[str, str]]:
    """The distinct values of `ORIGIN` in a shard's sidecar, sorted."""
    origins = {tuple(row[name] for name in ORIGIN) for row in read_rows(shard)}
    return [dict(zip(ORIGIN, values, strict=True)) for values in sorted(origins)]


def read_rows(shard: Path) -> Iterator[dict[str, str]]:
    """The rows of a shard's sidecar, with all fields; none without one. Raises DataError as `parse_description`."""
    path = descriptions_path(shard)
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            yield parse_description(line, path, number)


def parse_description(line: bytes, path: Path, number: int) -> dict[str, str]:
    """One line of a sidecar: all fields of `FIELDS`.

    Raises:
        DataError: It is not a description; the message names `path` and the line `number`.
    """
    try:
        row = {**DEFAULTS, **json.loads(line)}
        return {name: str(row[name]) for name in FIELDS}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}:{number}: not a description; remove the file and describe again") from None


def write_descriptions(shard: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Writes a shard's sidecar; each row has the fields of `FIELDS`, except perhaps those of `DEFAULTS`."""
    lines = []
    for row in ({**DEFAULTS, **row} for row in rows):
        assert set(row) == set(FIELDS), f"a description has the fields {FIELDS}, not {tuple(row)}"
        lines.append(json.dumps({name: row[name] for name in FIELDS}, ensure_ascii=False) + "\n")
    atomic_write(descriptions_path(shard), "".join(lines))
