"""The plan of a crawl: which photos, under which key, in which shard. Made before the first request, then only read.

`OUT/plan/<set>-<split>-NNNNNN.jsonl` holds one shard's photos; `OUT/plan/plan.json`, written last, says what they were
made from. Names, membership, order and bytes of every shard follow from the plan alone, not from who fetches what when.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lavic.data.atomic import write_whole, written_aside
from lavic.data.catalog import find_files, read_items
from lavic.data.manifest import shard_name
from lavic.data.records import SIZES, ImageSize, Item
from lavic.data.shards import sample_key
from lavic.errors import ConfigError, DataError

FORMAT = "lavic-plan/1"
FOLDER = "plan"
NAME = "plan.json"


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


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Everything besides the catalogue that decides what a shard's bytes are."""

    set: str
    split: str
    photos_per_shard: int
    images_per_item: int
    image_size: ImageSize
    limit: int | None
    ids: Path | None
    photo: Mapping[str, Any]
    """The settings of the photo check, as plain values."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan that is whole on the disk."""

    folder: Path
    """Of the set; the plan stands in its `plan/`."""
    digest: str
    """Over every planned photo and the settings."""
    shards: int
    photos: int
    items: int
    """Catalogue records that were read."""
    without_photo: int
    """Of these, how many have no photo with a URL."""
    repeated: int
    """Photos left out because an earlier record has the same item and number."""
    ids_missing: int
    """Item ids asked for that the catalogue does not have."""
    settings: Mapping[str, Any]
    sources: Mapping[str, str]

    def shard(self, number: int) -> Path:
        """Where a shard of the plan is to stand."""
        return self.folder / shard_name(self.settings["set"], self.settings["split"], number)

    def tasks(self, number: int) -> list[PhotoTask]:
        """The photos of one shard, in order."""
        return read_tasks(self.shard(number))


def read_tasks(shard: Path) -> list[PhotoTask]:
    """The photos planned for a shard, in order."""
    with _tasks_path(shard).open(encoding="utf-8") as lines:
        return [PhotoTask(**json.loads(line)) for line in lines]


def make_plan(items: tuple[str, ...], folder: Path, settings: PlanSettings) -> Plan:
    """Take up the plan of a folder, or make one where there is none.

    Raises:
        ConfigError: The folder holds a plan made from another catalogue or other settings; names what differs.
        DataError: The catalogue cannot be read, or has no photo to fetch.
    """
    chosen = _identity(settings)
    sources = {path: _fingerprint(path) for path in find_files(items)}
    if old := load_plan(folder):
        _refuse_change(old, chosen, sources)
        return old
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    counts = _Counts()
    tasks = _tasks(items, settings, counts)
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode())
    while chunk := list(islice(tasks, settings.photos_per_shard)):
        shard = folder / shard_name(settings.set, settings.split, counts.shards)
        with written_aside(_tasks_path(shard)) as file:
            for task in chunk:
                line = json.dumps(asdict(task), ensure_ascii=False).encode() + b"\n"
                digest.update(line)
                file.write(line)
        counts.shards += 1
        counts.photos += len(chunk)
    if not counts.photos:
        raise DataError(_nothing_planned(items, settings, counts))
    body = {"format": FORMAT, "digest": digest.hexdigest(), **vars(counts), "settings": chosen, "sources": sources}
    write_whole(folder / FOLDER / NAME, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    return _plan_of(folder, body)


def load_plan(folder: Path) -> Plan | None:
    """The plan of a folder, or None where there is none or it was never finished.

    Raises:
        DataError: It was made by another version, or is broken.
    """
    path = folder / FOLDER / NAME
    if not path.exists():
        return None
    try:
        body = json.loads(path.read_text("utf-8"))
        if body.get("format") != FORMAT:
            raise DataError(f"{path}: not in the form {FORMAT}; made by another version of lavic")
        return _plan_of(folder, body)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: broken plan ({error}); use another --out") from None


class _Counts:
    def __init__(self) -> None:
        self.shards = self.photos = self.items = self.without_photo = self.repeated = self.ids_missing = 0


def _tasks(items: tuple[str, ...], settings: PlanSettings, counts: _Counts) -> Iterator[PhotoTask]:
    wanted = None if settings.ids is None else set(_read_ids(settings.ids))
    found: set[str] = set()
    seen: set[bytes] = set()
    sizes = tuple(sorted(SIZES, key=lambda size: size != settings.image_size))
    for item in read_items(items, sizes=sizes):
        if wanted is not None and item.id not in wanted:
            continue
        if counts.items == settings.limit:
            break
        counts.items += 1
        if wanted is not None:
            found.add(item.id)
        photos = list(islice(item.photos, settings.images_per_item or None))
        counts.without_photo += not photos
        categories, details = " > ".join(item.categories), _details(item)
        for photo in photos:
            key = sample_key(item.id, photo.n)
            # Eight bytes a photo rather than its key: millions are planned.
            if (mark := hashlib.blake2b(key.encode(), digest_size=8).digest()) in seen:
                counts.repeated += 1
                continue
            seen.add(mark)
            yield PhotoTask(
                key=key,
                item_id=item.id,
                n=photo.n,
                url=photo.url,
                title=item.title,
                categories=categories,
                details=details,
                text=photo.description,
            )
    counts.ids_missing = len((wanted or set()) - found)


def _details(item: Item) -> str:
    """The free-form fields as one JSON text, so that the sample's own keys and types never change."""
    fields = {
        "categories": item.categories,
        "features": item.features,
        "description": item.description,
        "details": json.loads(item.details),
    }
    return json.dumps(fields, ensure_ascii=False)


def _read_ids(path: Path) -> list[str]:
    try:
        ids = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--ids {path}: cannot be read ({error})") from None
    if not ids:
        raise DataError(f"--ids {path}: no item id in it; one on each line is expected")
    return ids


def _identity(settings: PlanSettings) -> dict[str, Any]:
    """The settings as plain values; a file of ids by what is in it."""
    plain = asdict(settings)
    plain |= {f"photo.{name}": value for name, value in plain.pop("photo").items()}
    if settings.ids is not None:
        plain["ids"] = hashlib.sha256("\n".join(_read_ids(settings.ids)).encode()).hexdigest()[:16]
    return plain


def _fingerprint(path: str) -> str:
    """Changes when the file's content does."""
    if "://" not in path:
        digest = hashlib.sha256()
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return f"sha256:{digest.hexdigest()}"
    import fsspec

    fs, inner = fsspec.core.url_to_fs(path)
    return f"ukey:{fs.ukey(inner)}"


def _refuse_change(old: Plan, settings: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    differ = [
        f"--{key.replace('_', '-')} was {old.settings.get(key)} and is {value}"
        for key, value in settings.items()
        if old.settings.get(key) != value
    ]
    if list(old.sources.values()) != list(sources.values()):
        differ.insert(0, _changed_sources(old.sources, sources))
    if differ:
        raise ConfigError(
            f"{old.folder} was planned from another input: {'; '.join(differ)}; use another --out, or the same input"
        )


def _changed_sources(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    changed = [path for path in new if path in old and old[path] != new[path]]
    if changed:
        return f"the content of {', '.join(changed[:3])} has changed"
    return f"the catalogue was {', '.join(list(old)[:3])} and is {', '.join(list(new)[:3])}"


def _nothing_planned(items: tuple[str, ...], settings: PlanSettings, counts: _Counts) -> str:
    names = ", ".join(items)
    if settings.ids is not None and not counts.items:
        return f"{names}: none of the ids in {settings.ids} is in the catalogue"
    return f"{names}: no photo to fetch: {counts.items:,} items, {counts.without_photo:,} of them without a photo URL"


def _tasks_path(shard: Path) -> Path:
    return shard.parent / FOLDER / f"{shard.name.removesuffix('.tar')}.jsonl"


def _plan_of(folder: Path, body: Mapping[str, Any]) -> Plan:
    return Plan(folder=folder, **{key: value for key, value in body.items() if key != "format"})
