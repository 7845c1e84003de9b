"""Writes the conversations of all parts as the files of the set, and counts what they hold."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from lavic.data.reddit.id_manifest import manifest_line, manifest_path, row_line
from lavic.data.reddit.item_table import NO_CATEGORY, ItemTable, number_of_asin
from lavic.data.reddit.splits import NAMES, SUBMISSION
from lavic.data.reddit.threads import Example
from lavic.storage.atomic import atomic_open

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
_COUNTERS = ("categories", "subreddits", "years", "forms", "shops")


@dataclass
class SplitCounts:
    """What a split holds."""

    rows: int = 0
    submissions: int = 0
    items: int = 0
    """Items of all rows together, an item in two rows twice."""
    rows_with_several_items: int = 0
    rows_without_comments: int = 0
    turns: array[int] = field(default_factory=lambda: array("Q"))
    context_characters: array[int] = field(default_factory=lambda: array("Q"))
    item_numbers: array[int] = field(default_factory=lambda: array("Q"))
    author_numbers: array[int] = field(default_factory=lambda: array("Q"))
    first: int = 0
    """Time of the oldest submission; 0 for none."""
    last: int = 0
    counters: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in _COUNTERS})

    def add(self, example: Example, items: ItemTable) -> None:
        """Counts a conversation."""
        self.rows += 1
        self.items += len(example.gt_items)
        self.rows_with_several_items += len(example.gt_items) > 1
        self.rows_without_comments += "<comment>" not in example.context
        self.turns.append(example.context.count("</comment>") + example.context.count("</submission>"))
        self.context_characters.append(len(example.context))
        self.item_numbers.extend(number_of_asin(item) for item in example.gt_items)
        self.author_numbers.extend(int(name, 16) for name in (example.author, example.asker) if name)
        self.first = min(self.first or example.created, example.created)
        self.last = max(self.last, example.created)
        self.counters["categories"].update(items.category(item) or NO_CATEGORY for item in example.gt_items)
        self.counters["subreddits"][example.subreddit] += 1
        self.counters["years"][str(datetime.fromtimestamp(example.created, timezone.utc).year)] += 1
        self.counters["forms"].update(example.forms)
        self.counters["shops"].update(example.hosts)

    def as_json(self) -> dict[str, Any]:
        """The counts as plain values."""
        return {
            "rows": self.rows,
            "submissions": self.submissions,
            "items": self.items,
            "distinct_items": len(np.unique(self.item_numbers)),
            "rows_with_several_items": self.rows_with_several_items,
            "rows_without_comments": self.rows_without_comments,
            "turns": _quantiles(self.turns),
            "context_characters": _quantiles(self.context_characters),
            "first": _day(self.first),
            "last": _day(self.last),
            **{name: _ordered(counter) for name, counter in self.counters.items()},
        }


def write_set(
    folder: Path, parts: Sequence[Path], submissions: Sequence[Path], splits: Sequence[np.ndarray], items: ItemTable
) -> dict[str, Any]:
    """Writes `<split>.jsonl` and `<split>.ids.jsonl`; returns what they hold, as JSON.

    `parts` are files of conversations, in the order of the buckets. Each has a file of its submissions, and their
    splits, which are places in `NAMES`.
    """
    counts = [SplitCounts() for _ in NAMES]
    with ExitStack() as stack:
        rows = [stack.enter_context(atomic_open(folder / f"{name}.jsonl")) for name in NAMES]
        ids = [stack.enter_context(atomic_open(manifest_path(folder, name))) for name in NAMES]
        for part, file, split_numbers in zip(parts, submissions, splits, strict=True):
            numbers = np.fromfile(file, SUBMISSION)["id"]
            split_of_submission = dict(zip(numbers.tolist(), split_numbers.tolist(), strict=True))
            for n in split_numbers.tolist():
                counts[n].submissions += 1
            with part.open("rb") as lines:
                for line in lines:
                    example = _example(line)
                    n = split_of_submission[example.submission]
                    rows[n].write(row_line(example.row))
                    ids[n].write(manifest_line(example))
                    counts[n].add(example, items)
    return {
        "splits": {name: split.as_json() for name, split in zip(NAMES, counts, strict=True)},
        "overlap": _overlap(counts),
    }


def _example(line: bytes) -> Example:
    values: dict[str, Any] = json.loads(line)
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Example(**fields)


def _overlap(counts: Sequence[SplitCounts]) -> dict[str, dict[str, int]]:
    """Items and authors of a later split that an earlier one has too."""
    items = [np.unique(np.array(split.item_numbers, np.uint64)) for split in counts]
    authors = [np.unique(np.array(split.author_numbers, np.uint64)) for split in counts]
    pairs = {"train and valid": (0, 1), "train and test": (0, 2), "valid and test": (1, 2)}
    return {
        pair: {
            "items": len(np.intersect1d(items[a], items[b], assume_unique=True)),
            "items_of_the_later": len(items[b]),
            "authors": len(np.intersect1d(authors[a], authors[b], assume_unique=True)),
            "authors_of_the_later": len(authors[b]),
        }
        for pair, (a, b) in pairs.items()
    }


def _quantiles(values: array[int]) -> dict[str, float]:
    if not values:
        return {}
    numbers = np.array(values, np.uint64)
    named = {f"p{round(100 * q)}": float(np.quantile(numbers, q)) for q in _QUANTILES}
    return {"mean": round(float(numbers.mean()), 2), **named}


def _ordered(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda entry: (-entry[1], entry[0])))


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).date().isoformat() if seconds else ""
