"""The photos to fetch: selects items and photos of a catalogue."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lavic.data.catalog import read_items
from lavic.data.schema import SIZES, ImageSize, Item, Photo
from lavic.data.sources.record import BadRecord
from lavic.data.tar_shards import sample_key
from lavic.errors import DataError
from lavic.shards.plan.counts import PlanCounts
from lavic.shards.plan.existing_items import ExistingItems
from lavic.shards.plan.external_dedup import hash64
from lavic.storage.atomic import atomic_write
from lavic.storage.text_files import TextFileError, read_lines

_to_json = json.JSONEncoder(ensure_ascii=False).encode
"""Made once: `json.dumps` with options makes an encoder for every photo."""
REJECTED = "rejected.jsonl"
"""Lists the records of the catalogue that could not be read: file, line, reason."""


@dataclass(frozen=True, kw_only=True)
class PhotoTask:
    """One photo to fetch, with the fields of its sample."""

    key: str
    item_id: str
    n: int
    url: str
    title: str
    categories: str
    details: str
    text: str
    same_as: str = ""
    """Key of the photo in the same shard that shows the same picture and is fetched for both."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """All settings that affect a shard's bytes."""

    set: str
    split: str
    photos_per_shard: int
    photos: str
    """Photos of an item: `first`, `all`, or their number from the first."""
    image_size: ImageSize
    splits: Mapping[str, float] = field(default_factory=dict)
    """Share of the items by split; if empty, all items are in `split`."""
    text: Literal["auto", "catalogue", "title", "none"] = "catalogue"
    """Source of the txt members; `auto` becomes `catalogue` or `title`, see `Captions`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """For files with one link per row: name of each column by its content."""
    duplicates: Literal["stored", "referenced"] = "stored"
    """How photos with the same bytes are stored."""
    limit: int | None = None
    ids: str | None = None
    photo: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the photo check, as plain values."""


class Rejects:
    """Collects the records that cannot be read, and raises if there are too many."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Start empty; `limit` is the most records that are accepted."""
        self.path, self.limit = folder / REJECTED, limit
        self.rows: list[dict[str, Any]] = []
        self.records = 0
        """Rows with a line; those without are about a file."""

    def add(self, bad: BadRecord) -> None:
        """Add one.

        Raises:
            DataError: There are too many.
        """
        self.rows.append({"file": bad.file, "line": bad.line, "reason": bad.reason})
        self.records += bad.line > 0
        if self.records > self.limit:
            self.write()
            raise DataError(
                f"more than {self.limit:,} records of the catalogue cannot be read, the last: {bad}; see {self.path}, "
                "and fix the file or accept more with --max-rejected"
            )

    def write(self) -> None:
        """Write the list; no file if it is empty."""
        if self.rows:
            atomic_write(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        else:
            self.path.unlink(missing_ok=True)


class Captions:
    """Texts of the txt members. `auto` is decided while the catalogue is read.

    It gives titles until an item with a description comes: a catalogue without descriptions keeps the titles, in any
    other the descriptions are used and the titles that were given are withdrawn.
    """

    def __init__(self, text: Literal["auto", "catalogue", "title", "none"]) -> None:
        self._undecided = text == "auto"
        self.text = "title" if text == "auto" else text
        self._given = 0
        self.withdrawn = 0
        """Number of photos, from the first, that get an empty text instead of their title."""

    def see(self, item: Item) -> None:
        """Decide by an item, selected or not."""
        if self._undecided and item.descriptions:
            self._undecided, self.text, self.withdrawn = False, "catalogue", self._given

    def text_of(self, item: Item, photo: Photo) -> str:
        """The text of the next photo."""
        self._given += 1
        return {"catalogue": photo.description, "title": item.title}.get(self.text, "")


def select_photos(
    items: tuple[str, ...],
    settings: PlanSettings,
    counts: PlanCounts,
    rejects: Rejects,
    existing: ExistingItems,
    captions: Captions,
) -> Iterator[PhotoTask]:
    """The selected photos of a catalogue, in its order. Counts, rejects, existing items and captions are updated.

    Raises:
        DataError: The catalogue cannot be read.
    """
    selected = None if settings.ids is None else set(read_ids(settings.ids))
    present: set[str] = set()
    sizes = tuple(sorted(SIZES, key=lambda size: size != settings.image_size))
    limit = {"first": 1, "all": None}[settings.photos] if settings.photos in ("first", "all") else int(settings.photos)
    low, high = share_of(settings)
    num_items = 0
    for item in read_items(items, rejects.add, sizes=sizes, columns=settings.columns):
        captions.see(item)
        if selected is not None and item.id not in selected:
            continue
        if settings.splits and not low <= _fraction(item.id) < high:
            continue
        if num_items == settings.limit:
            break
        num_items += 1
        if selected is not None:
            present.add(item.id)
        photos = list(islice(item.photos, limit))
        if not existing.is_new(item.id, bool(photos), counts):
            continue
        counts.unlinked += item.unlinked
        categories, details = " > ".join(item.categories), _details(item)
        for photo in photos:
            yield PhotoTask(
                key=sample_key(item.id, photo.n),
                item_id=item.id,
                n=photo.n,
                url=photo.url,
                title=item.title,
                categories=categories,
                details=details,
                text=captions.text_of(item, photo),
            )
    else:
        # Only the end of the catalogue shows which are missing.
        counts.ids_missing = len((selected or set()) - present)
    counts.rejected = rejects.records


def share_of(settings: PlanSettings) -> tuple[float, float]:
    """The part of [0, 1) that belongs to the split."""
    low = 0.0
    for name, share in settings.splits.items():
        if name == settings.split:
            # The last one ends at 1, whatever the rounded sum is.
            return low, min(low + share, 1.0) if low + share < 1 - 1e-9 else 1.0
        low += share
    return 0.0, 1.0


def task_line(task: PhotoTask) -> bytes:
    """A task as a line of a plan."""
    return _to_json(vars(task)).encode() + b"\n"


def read_task(line: bytes) -> PhotoTask:
    """The task of a line of `task_line`."""
    return PhotoTask(**json.loads(line))


def read_ids(path: str) -> list[str]:
    """Item ids of a file, one on each line.

    Raises:
        DataError: It cannot be read, or has none.
    """
    try:
        ids = [line.strip() for _, line in read_lines(path) if line.strip()]
    except TextFileError as error:
        raise DataError(f"--ids {error}") from None
    if not ids:
        raise DataError(f"--ids {path}: no item id in it; one on each line is expected")
    return ids


def _fraction(item_id: str) -> float:
    # The text differs from those that are hashed elsewhere, so that splits are independent of them.
    return int.from_bytes(hash64(f"split {item_id}"), "little") / 2**64


def _details(item: Item) -> str:
    """The free-form fields as one JSON text, so that the sample's keys and types never change."""
    fields = {
        "categories": item.categories,
        "features": item.features,
        "description": item.description,
        "details": json.loads(item.details),
    }
    return _to_json(fields)
