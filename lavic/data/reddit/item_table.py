"""The catalogue's items and their variants, looked up in files on disk.

Amazon Reviews 2023 keys its items by `parent_asin` and has no list of variants; its reviews hold both ids.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lavic.data.catalog import read_items
from lavic.data.reddit.dumps.dump_file import read_pieces
from lavic.data.reddit.dumps.id_table import BUCKETS, Table, merge_tables, numbers_of, write_table
from lavic.data.reddit.dumps.post import BadPost, read_object
from lavic.data.sources.record import BadRecord
from lavic.storage.atomic import atomic_write

NO_CATEGORY = "(none)"

_DIGITS = 10
_ITEMS, _VARIANTS, _CATEGORIES = "items.table", "variants.table", "categories.json"


def number_of_asin(asin: str) -> int:
    """An Amazon id as a number; 0 for another text."""
    return int(asin, 36) if len(asin) == _DIGITS and asin.isascii() and asin.isalnum() else 0


def asin_of_number(number: int) -> str:
    """The id of such a number."""
    digits = ""
    for _ in range(_DIGITS):
        number, digit = divmod(number, 36)
        digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"[digit] + digits
    return digits


def read_catalogue(path: str, out: Path) -> dict[str, int]:
    """Writes the table of one catalogue file; returns counts of its records. Raises DataError as `read_items`."""
    bad_records: list[BadRecord] = []
    numbers, categories = array("Q"), array("Q")
    names: dict[str, int] = {}
    counts = {"items": 0, "items_without_an_amazon_id": 0}
    for item in read_items([path], bad_records.append):
        counts["items"] += 1
        if not (number := number_of_asin(item.id.upper())):
            counts["items_without_an_amazon_id"] += 1
            continue
        name = item.categories[0] if item.categories else NO_CATEGORY
        numbers.append(number)
        categories.append(names.setdefault(name, len(names)))
    counts["broken_records"] = len(bad_records)
    notes = {"categories": list(names), "counts": counts, "broken": str(bad_records[0]) if bad_records else ""}
    atomic_write(out.with_suffix(".json"), json.dumps(notes))
    write_table(out, np.array(numbers, np.uint64), np.array(categories, np.uint64))
    return counts


def read_reviews(path: str, out: Path) -> dict[str, int]:
    """Writes the table of the variants that a file of reviews names; returns counts of its lines.

    Raises DataError as `read_pieces`.
    """
    counts = {"reviews": 0, "broken_reviews": 0}
    pairs: set[tuple[int, int]] = set()
    for piece in read_pieces(path):
        for line in piece.splitlines():
            if not line.strip():
                continue
            counts["reviews"] += 1
            try:
                row = read_object(line)
            except BadPost:
                row = {}
            child, parent = (str(row.get(key) or "").upper() for key in ("asin", "parent_asin"))
            numbers = number_of_asin(child), number_of_asin(parent)
            if not all(numbers):
                counts["broken_reviews"] += 1
            elif child != parent:
                pairs.add(numbers)
    columns = np.array(sorted(pairs), np.uint64).reshape(-1, 2)
    atomic_write(out.with_suffix(".json"), json.dumps({"counts": counts}))
    write_table(out, columns[:, 0], columns[:, 1])
    return counts


def merge_catalogue(folder: Path, items: Sequence[Path], variants: Sequence[Path]) -> None:
    """Makes one table of items and one of variants from those of the files."""
    names = {path: json.loads(path.with_suffix(".json").read_text("utf-8"))["categories"] for path in items}
    categories = sorted({name for categories_of_file in names.values() for name in categories_of_file})
    category_numbers = {name: n for n, name in enumerate(categories)}
    renamed = []
    for path in items:
        numbers = np.array([category_numbers[name] for name in names[path]], np.uint64)
        columns = np.concatenate([Table(path).bucket(n) for n in range(BUCKETS)])
        renamed.append(path.with_suffix(".renamed"))
        write_table(renamed[-1], numbers_of(columns[:, 0]), numbers[columns[:, 1].astype(np.int64)])
    merge_tables(folder / _VARIANTS, variants, with_values=True)
    merge_tables(folder / _ITEMS, renamed, with_values=True)
    atomic_write(folder / _CATEGORIES, json.dumps(categories))


def first_broken(tables: Sequence[Path]) -> str:
    """The first record that could not be read, of the files of some tables; empty where all could."""
    notes = (json.loads(path.with_suffix(".json").read_text("utf-8")) for path in tables)
    return next((str(note["broken"]) for note in notes if note["broken"]), "")


class ItemTable:
    """Which ids are items of the catalogue, and which are variants of one; in a folder of `merge_catalogue`."""

    def __init__(self, folder: Path) -> None:
        self._items = Table(folder / _ITEMS)
        self._variants = Table(folder / _VARIANTS)
        self._categories: list[str] = json.loads((folder / _CATEGORIES).read_text("utf-8"))

    @staticmethod
    def is_complete(folder: Path) -> bool:
        """Whether the table is there."""
        return (folder / _CATEGORIES).exists()

    def __len__(self) -> int:
        return len(self._items)

    def parents(self, asins: Sequence[str]) -> list[str]:
        """The item of the catalogue for each id; empty where there is none.

        An id that is an item stays itself. Where reviews name two parents of a variant, the first in the catalogue is
        taken.
        """
        if not asins:
            return []
        numbers = [number_of_asin(asin) for asin in asins]
        known = self._items.contains(np.array(numbers, np.uint64))
        return [asin if ok else self._parent(number) for asin, ok, number in zip(asins, known, numbers, strict=True)]

    def category(self, asin: str) -> str:
        """The category of an item of the catalogue."""
        numbers = self._items.values(number_of_asin(asin))
        return self._categories[numbers[0]] if numbers else NO_CATEGORY

    def _parent(self, number: int) -> str:
        parents = self._variants.values(number)
        known = self._items.contains(np.array(parents, np.uint64))
        return next((asin_of_number(parent) for parent, ok in zip(parents, known, strict=True) if ok), "")
