"""The photos to fetch: which of a catalogue's items and photos are wanted, and what is known of each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lavic.data.catalog import read_items
from lavic.data.schema import SIZES, ImageSize, Item
from lavic.data.sources.record import BadRecord
from lavic.data.tar_shards import sample_key
from lavic.errors import DataError
from lavic.shards.plan.captions import Captions
from lavic.shards.plan.counts import Counts
from lavic.shards.plan.existing_items import KnownItems
from lavic.shards.plan.external_dedup import mark_of
from lavic.storage.atomic import write_whole
from lavic.storage.text_files import TextFileError, read_lines

REJECTED = "rejected.jsonl"
"""Names every record of the catalogue that could not be read: file, line, reason."""


@dataclass(frozen=True, kw_only=True)
class PhotoTask:
    """One photo to fetch, with what goes into its sample."""

    key: str
    item_id: str
    n: int
    url: str
    title: str
    categories: str
    details: str
    text: str
    same_as: str = ""
    """Key of the photo in the same shard that shows this picture too, and is fetched for both."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Everything besides the catalogue that decides what a shard's bytes are."""

    set: str
    split: str
    photos_per_shard: int
    photos: str
    """Of an item: `first`, `all`, or how many from the first."""
    image_size: ImageSize
    splits: Mapping[str, float] = field(default_factory=dict)
    """Share of the items by split; none means that all items are in `split`."""
    text: Literal["auto", "catalogue", "title", "none"] = "catalogue"
    """Where the txt members come from; `auto` is one of `catalogue` and `title`, see `Captions`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Of files with a link in each row: name of the column by what it holds."""
    duplicates: Literal["stored", "referenced"] = "stored"
    """What becomes of photos with the same bytes."""
    limit: int | None = None
    ids: str | None = None
    photo: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the photo check, as plain values."""


class Rejects:
    """Collects the records that cannot be read, and stops where there are too many."""

    def __init__(self, folder: Path, most: int) -> None:
        """Begin.

        Args:
            folder: Of the set; `rejected.jsonl` is written there.
            most: How many are borne.
        """
        self.path, self.most = folder / REJECTED, most
        self.rows: list[dict[str, Any]] = []
        self.records = 0
        """Rows that name a record; one without a line is about a whole file."""

    def add(self, bad: BadRecord) -> None:
        """Take one in.

        Raises:
            DataError: That was one too many.
        """
        self.rows.append({"file": bad.file, "line": bad.line, "reason": bad.reason})
        self.records += bad.line > 0
        if self.records > self.most:
            self.write()
            raise DataError(
                f"more than {self.most:,} records of the catalogue cannot be read, the last: {bad}; all of them so far "
                f"are in {self.path}; mend the file, or let more through with --max-rejected"
            )

    def write(self) -> None:
        """Write those so far; no file where there is none."""
        if self.rows:
            write_whole(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        else:
            self.path.unlink(missing_ok=True)


def wanted_photos(
    items: tuple[str, ...],
    settings: PlanSettings,
    counts: Counts,
    rejects: Rejects,
    known: KnownItems,
    captions: Captions,
) -> Iterator[PhotoTask]:
    """The photos of a catalogue that the settings ask for, in its order.

    Args:
        items: The catalogue's files.
        settings: What is wanted.
        counts: Counted up on the way.
        rejects: Takes the records that cannot be read.
        known: The items that the set has already; takes in the new ones without a photo.
        captions: Gives the texts.

    Raises:
        DataError: The catalogue cannot be read.
    """
    wanted = None if settings.ids is None else set(read_ids(settings.ids))
    found: set[str] = set()
    sizes = tuple(sorted(SIZES, key=lambda size: size != settings.image_size))
    most = {"first": 1, "all": None}[settings.photos] if settings.photos in ("first", "all") else int(settings.photos)
    low, high = share_of(settings)
    taken = 0
    for item in read_items(items, rejects.add, sizes=sizes, columns=settings.columns):
        captions.meet(item)
        if wanted is not None and item.id not in wanted:
            continue
        if settings.splits and not low <= _fraction(item.id) < high:
            continue
        if taken == settings.limit:
            break
        taken += 1
        if wanted is not None:
            found.add(item.id)
        photos = list(islice(item.photos, most))
        if not known.is_new(item.id, bool(photos), counts):
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
                text=captions.of(item, photo),
            )
    counts.ids_missing = len((wanted or set()) - found)
    counts.rejected = rejects.records


def share_of(settings: PlanSettings) -> tuple[float, float]:
    """Which part of [0, 1) belongs to the split."""
    low = 0.0
    for name, share in settings.splits.items():
        if name == settings.split:
            # So that the last of them ends at 1 whatever the sums of fractions give.
            return low, min(low + share, 1.0) if low + share < 1 - 1e-9 else 1.0
        low += share
    return 0.0, 1.0


def task_line(task: PhotoTask) -> bytes:
    """A task as a line of a plan."""
    return json.dumps(vars(task), ensure_ascii=False).encode() + b"\n"


def read_task(line: bytes) -> PhotoTask:
    """The task that `task_line` made a line of."""
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
    # Another hash than that of the plan's marks is not needed, another text is: ids and keys must not go together.
    return int.from_bytes(mark_of(f"split {item_id}"), "little") / 2**64


def _details(item: Item) -> str:
    """The free-form fields as one JSON text, so that the sample's own keys and types never change."""
    fields = {
        "categories": item.categories,
        "features": item.features,
        "description": item.description,
        "details": json.loads(item.details),
    }
    return json.dumps(fields, ensure_ascii=False)
