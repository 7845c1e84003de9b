"""The ids of a set, by which it can be shared without its text and rebuilt from dumps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavic.data.reddit.dumps.post import id_of, number_of
from lavic.data.reddit.threads import Example
from lavic.errors import DataError
from lavic.storage.json_text import BadJson, parse_json
from lavic.storage.text_files import read_lines


def manifest_path(folder: Path, split: str) -> Path:
    """The ids of a split."""
    return folder / f"{split}.ids.jsonl"


def row_line(row: Mapping[str, Any]) -> bytes:
    """A row in the LaViC format, as a line."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def digest_of_row(line: bytes) -> str:
    """16 hex digits for a row's line, which tell whether it was rebuilt unchanged."""
    return hashlib.blake2b(line, digest_size=8).hexdigest()


def manifest_line(example: Example) -> bytes:
    """The ids of a conversation, as a line."""
    row = {
        "submission": id_of(example.submission),
        "turns": [id_of(turn) for turn in example.turns],
        "comment": id_of(example.comment),
        "created_utc": example.created,
        "subreddit": example.subreddit,
        "context_items": example.context_items,
        "gt_items": example.gt_items,
        "digest": digest_of_row(row_line(example.row)),
    }
    return json.dumps(row).encode() + b"\n"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A conversation by its ids."""

    split: str
    number: int
    """Its row in the split's file, from 0."""
    submission: int
    turns: tuple[int, ...]
    comment: int
    context_items: tuple[str, ...]
    gt_items: tuple[str, ...]
    digest: str


def read_entries(folder: Path, split: str) -> Iterator[Entry]:
    """The conversations of a split. Raises DataError for a missing file, and for a line of another form."""
    path = manifest_path(folder, split)
    for number, (line, text) in enumerate(read_lines(path)):
        try:
            row = parse_json(text)
            entry = Entry(
                split=split,
                number=number,
                submission=number_of(row["submission"]),
                turns=tuple(number_of(turn) for turn in row["turns"]),
                comment=number_of(row["comment"]),
                context_items=tuple(row["context_items"]),
                gt_items=tuple(row["gt_items"]),
                digest=row["digest"],
            )
        except (BadJson, KeyError, TypeError):
            raise DataError(f"{path}:{line}: not the ids of a conversation of lavic reddit") from None
        if not all((entry.submission, entry.comment, *entry.turns)):
            raise DataError(f"{path}:{line}: an id that is not Reddit's")
        yield entry
