"""Splits submissions into train, valid and test by time; groups of equal submissions are not divided."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lavic.data.reddit.near_duplicates import PERMUTATIONS, group_submissions
from lavic.data.reddit.settings import SplitSettings

NAMES = ("train", "valid", "test")

SUBMISSION = np.dtype(
    [
        ("id", "<u8"),
        ("created", "<i8"),
        ("rows", "<i8"),
        ("crosspost", "<u8"),
        ("exact", "<u8"),
        ("signature", "<u4", PERMUTATIONS),
    ]
)
"""A submission with conversations; one file of these per part of the buckets."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The split of every submission."""

    parts: list[np.ndarray]
    """For each part its submissions' places in `NAMES`: int64 [n]."""
    groups: int
    """Groups of more than one submission."""
    grouped: int
    """Submissions in these."""
    moved: int
    """Submissions that are in an earlier split than their own time says, with the first of their group."""


def split_submissions(files: list[Path], settings: SplitSettings) -> Splits:
    """Splits the submissions of some files of rows of `SUBMISSION`."""
    tables = [np.memmap(file, SUBMISSION, "r") if file.stat().st_size else np.empty(0, SUBMISSION) for file in files]
    sizes = [len(table) for table in tables]

    def column(name: str) -> np.ndarray:
        return np.concatenate([np.ascontiguousarray(table[name]) for table in tables])

    ids, created, rows = column("id"), column("created"), column("rows")
    order = np.lexsort((ids, created))
    groups = group_submissions(
        ids[order],
        column("crosspost")[order],
        column("exact")[order],
        column("signature")[order],
        settings.near_duplicates,
    )
    times = created[order]
    first = times[groups]
    edges = settings.days or _edges(first, rows[order], settings)
    chosen = np.searchsorted(np.array(edges), first, side="right")
    ungrouped = np.searchsorted(np.array(edges), times, side="right")
    counts = np.bincount(groups, minlength=len(groups))
    split_numbers = np.empty(len(ids), np.int64)
    split_numbers[order] = chosen
    return Splits(
        parts=np.split(split_numbers, np.cumsum(sizes)[:-1]),
        groups=int((counts > 1).sum()),
        grouped=int(counts[counts > 1].sum()),
        moved=int((chosen != ungrouped).sum()),
    )


def _edges(times: np.ndarray, rows: np.ndarray, settings: SplitSettings) -> tuple[int, int]:
    """When validation and test begin, so that each has about its share of the rows; one second is one split."""
    if not len(times):
        return 0, 0
    order = np.argsort(times, kind="stable")
    before = np.cumsum(rows[order]) - rows[order]
    total = int(rows.sum())

    def edge(share: float) -> int:
        # Rounded, so that 1 - 0.1 - 0.1 of ten rows is eight.
        index = int(np.searchsorted(before, round(total * share, 6)))
        return int(times[order[index]]) if index < len(times) else int(times[order[-1]]) + 1

    return edge(1 - settings.valid_share - settings.test_share), edge(1 - settings.test_share)
