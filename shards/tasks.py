"""The photos to fetch: which of a catalogue's items and photos are wanted, and what is known of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lavic.data.atomic import write_whole
from lavic.data.catalog import read_items
from lavic.data.records import SIZES, ImageSize, Item, Photo
from lavic.data.shards import sample_key
from lavic.data.sources.record import BadRecord
from lavic.errors import DataError
from lavic.shards.repeats import mark_of
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


@dataclass(kw_only=True)
class Counts:
    """What was met on the way through a catalogue."""

    items: int = 0
    """Items that were wanted and new."""
    without_photo: int = 0
    """Of these, how many have no photo with a link. Less than none where items that had none have one now."""
    unlinked: int = 0
    """Entries of the items' lists of images that have no link."""
    photos: int = 0
    repeated: int = 0
    """Photos left out because an earlier record has the same item and number."""
    shared: int = 0
    """Photos that an earlier link shows too, maybe in another size; they are fetched with it."""
    rejected: int = 0
    """Records that could not be read."""
    known: int = 0
    """Items left out because the set has them already."""
    ids_missing: int = 0
    """Item ids asked for that the catalogue does not have."""


OF_LAST_READING = ("rejected", "ids_missing")
"""Counts that each reading of a catalogue makes anew: those of different readings are not added up."""


class KnownItems:
    """The items that a set has already, by their marks."""

    def __init__(self, planned: Iterable[bytes] = (), photoless: Iterable[bytes] = ()) -> None:
        """Take them in.

        Args:
            planned: Marks of items with photos, eight bytes each, put together in any way.
            photoless: Marks of items that had no photo with a link.
        """
        self._planned, self._photoless = _sorted(planned), _sorted(photoless)
        self.new_photoless = bytearray()
        """Marks of items without a photo that are new."""

    def is_new(self, item_id: str, has_photo: bool, counts: Counts) -> bool:
        """Whether an item's photos are to be planned; counts it."""
        mark = mark_of(item_id)
        if _is_in(self._planned, mark) or (not has_photo and _is_in(self._photoless, mark)):
            counts.known += 1
            return False
        if _is_in(self._photoless, mark):
            counts.without_photo -= 1
            return True
        counts.items += 1
        if not has_photo:
            counts.without_photo += 1
            self.new_photoless += mark
        return True


class Captions:
    """What the txt members hold, decided on the way where the settings leave it open.

    `auto` gives the title until a description is met: a catalogue that has none keeps the titles, in any other the
    descriptions count and the titles that were given are taken back.
    """

    def __init__(self, text: Literal["auto", "catalogue", "title", "none"]) -> None:
        """Begin.

        Args:
            text: See `PlanSettings`.
        """
        self._open = text == "auto"
        self.text = "title" if text == "auto" else text
        self.given = 0
        """Photos so far."""
        self.taken_back = 0
        """How many of these, from the first, get an empty text instead of their title."""

    def meet(self, item: Item) -> None:
        """Look at an item, wanted or not."""
        if self._open and item.descriptions:
            self._open, self.text, self.taken_back = False, "catalogue", self.given

    def of(self, item: Item, photo: Photo) -> str:
        """The text of the next photo."""
        self.given += 1
        return {"catalogue": photo.description, "title": item.title}.get(self.text, "")


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

    def add(self, bad: BadRecord) -> None:
        """Take one in.

        Raises:
            DataError: That was one too many.
        """
        self.rows.append({"file": bad.file, "line": bad.line, "reason": bad.reason})
        if len(self.rows) > self.most:
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
    counts.rejected = len(rejects.rows)


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


def _sorted(marks: Iterable[bytes]) -> np.ndarray:
    """Marks as sorted numbers: uint64 [k]."""
    return np.unique(np.concatenate([np.empty(0, "<u8"), *(np.frombuffer(part, "<u8") for part in marks)]))


def _is_in(known: np.ndarray, mark: bytes) -> bool:
    if not len(known):
        return False
    value = np.frombuffer(mark, "<u8")[0]
    at = int(np.searchsorted(known, value))
    return at < len(known) and known[at] == value


def _details(item: Item) -> str:
    """The free-form fields as one JSON text, so that the sample's own keys and types never change."""
    fields = {
        "categories": item.categories,
        "features": item.features,
        "description": item.description,
        "details": json.loads(item.details),
    }
    return json.dumps(fields, ensure_ascii=False)
