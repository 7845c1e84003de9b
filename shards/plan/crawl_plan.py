"""The plan of a crawl: which photos, under which key, in which shard. Made before the first request, then only read.

`OUT/plan/<set>-<split>-NNNNNN.jsonl` holds one shard's photos; `OUT/plan/plan.json`, written last, says what they were
made from. Names, membership, order and bytes of every shard follow from the plan alone, not from who fetches what when.
Photos that show the same picture stand together in one shard, so that one worker fetches it once for all of them.
A plan that is extended gets another generation, with shards of its own; those of the earlier ones stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lavic.data.catalog import find_files
from lavic.data.manifest import shard_name
from lavic.errors import ConfigError, DataError
from lavic.shards.image.normalize import PhotoSettings
from lavic.shards.plan.captions import Captions
from lavic.shards.plan.catalog_fingerprint import fingerprint, same_content, what_changed
from lavic.shards.plan.counts import OF_LAST_READING, Counts
from lavic.shards.plan.existing_items import KnownItems
from lavic.shards.plan.external_dedup import mark_of
from lavic.shards.plan.photo_tasks import PhotoTask, PlanSettings, Rejects, read_ids, read_task, wanted_photos
from lavic.shards.plan.task_spool import Spool, dealt
from lavic.storage.atomic import write_whole, written_aside
from lavic.storage.paths import is_remote

log = logging.getLogger(__name__)

FORMAT = "lavic-plan/2"
FOLDER = "plan"
NAME = "plan.json"
_SAY_S = 10.0
_MAY_GROW = ("limit", "ids")
"""Settings that another generation may have otherwise: they choose items and say nothing about a shard's bytes."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The shards that one reading of a catalogue has given."""

    sources: Mapping[str, Mapping[str, Any]]
    """Fingerprints of the catalogue's files, by path."""
    limit: int | None
    ids: str | None
    counts: Mapping[str, int]
    """See `Counts`."""
    shards: tuple[str, ...]
    """For each shard the digest of its photos and of the settings: equal digests, equal bytes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan that is whole on the disk."""

    folder: Path
    """Of the set; the plan stands in its `plan/`."""
    settings: Mapping[str, Any]
    generations: tuple[Generation, ...]

    @property
    def digests(self) -> list[str]:
        """Of every shard, by number."""
        return [digest for generation in self.generations for digest in generation.shards]

    @property
    def digest(self) -> str:
        """Over every planned photo and the settings."""
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()

    @property
    def counts(self) -> Counts:
        """Over all generations."""
        total = Counts()
        for generation in self.generations:
            for name, count in generation.counts.items():
                setattr(total, name, count + (0 if name in OF_LAST_READING else getattr(total, name)))
        return total

    def shard(self, number: int) -> Path:
        """Where a shard of the plan is to stand."""
        return self.folder / shard_name(self.settings["set"], self.settings["split"], number)


def read_tasks(shard: Path) -> list[PhotoTask]:
    """The photos planned for a shard, in order."""
    with tasks_path(shard).open("rb") as lines:
        return [read_task(line) for line in lines]


def make_plan(
    items: tuple[str, ...], folder: Path, settings: PlanSettings, *, extend: bool = False, max_rejected: int = 100
) -> Plan:
    """Take up the plan of a folder, or make one where there is none.

    Args:
        items: The catalogue's files.
        folder: Of the set.
        settings: What decides the shards' bytes.
        extend: Where the catalogue is another than that of the plan, add the items that the plan does not have.
        max_rejected: Records that cannot be read and are borne.

    Raises:
        ConfigError: The folder holds a plan made from another catalogue or other settings; names what differs.
        DataError: The catalogue cannot be read, or has no photo to fetch.
    """
    chosen = _identity(settings)
    grows = {name: chosen.pop(name) for name in _MAY_GROW}
    old = load_plan(folder)
    last = old.generations[-1] if old else None
    if old and chosen["text"] == "auto":
        # What was decided for the first photos holds for the later ones too.
        was = old.settings.get("text", "catalogue")
        chosen["text"] = "auto" if was == "none" else was
    sources = {path: fingerprint(path, last.sources if last else {}) for path in find_files(items)}
    if old and last:
        _refuse(old, _changed_settings(_completed(old.settings, chosen), chosen))
        changes = _changed_settings({name: getattr(last, name) for name in _MAY_GROW}, grows)
        if not same_content(last.sources, sources):
            changes.insert(0, what_changed(last.sources, sources))
        if not changes:
            return old
        if not extend:
            _refuse(old, changes, ", or --extend to add the items that are new")
    first = len(old.digests) if old else 0
    if not is_remote(folder):
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    rejects, counts, known = Rejects(folder, max_rejected), Counts(), _known_items(old)
    captions = Captions(chosen["text"])
    digests: list[str] = []
    room = None if is_remote(folder) else folder / FOLDER
    with tempfile.TemporaryDirectory(prefix=".tasks.", suffix=".part", dir=room) as scratch:
        spool = Spool(Path(scratch))
        said = time.monotonic()
        for task in wanted_photos(items, settings, counts, rejects, known, captions):
            spool.add(task)
            if time.monotonic() - said > _SAY_S:
                said = time.monotonic()
                log.info("planning: %s photos of %s items so far", f"{len(spool):,}", f"{counts.items:,}")
        rejects.write()
        chosen["text"], spool.untitled = captions.text, captions.taken_back
        for lines in dealt(spool.groups(settings.photos_per_shard, counts), settings.photos_per_shard):
            digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode())
            shard = folder / shard_name(settings.set, settings.split, first + len(digests))
            with written_aside(tasks_path(shard)) as file:
                for line in lines:
                    digest.update(line)
                    file.write(line)
            digests.append(digest.hexdigest())
    if not counts.photos and not old:
        raise DataError(_nothing_planned(items, settings, counts, rejects))
    if known.new_photoless:
        write_whole(_photoless_path(folder, len(old.generations) if old else 0), bytes(known.new_photoless))
    made = Generation(sources=sources, **grows, counts=asdict(counts), shards=tuple(digests))
    plan = Plan(folder=folder, settings=chosen, generations=(*(old.generations if old else ()), made))
    body = {"format": FORMAT, "settings": plan.settings, "generations": [asdict(part) for part in plan.generations]}
    write_whole(folder / FOLDER / NAME, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    return plan


def load_plan(folder: Path) -> Plan | None:
    """The plan of a folder, or None where there is none or it was never finished.

    Raises:
        DataError: It was made by another version, or is broken.
    """
    path = folder / FOLDER / NAME
    try:
        text = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        body = json.loads(text)
        if body.get("format") != FORMAT:
            raise DataError(f"{path}: not in the form {FORMAT}; made by another version of lavic: use another --out")
        generations = tuple(Generation(**{**part, "shards": tuple(part["shards"])}) for part in body["generations"])
        if not generations:
            raise ValueError("no generation")
        return Plan(folder=folder, settings=dict(body["settings"]), generations=generations)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: broken plan ({error}); use another --out") from None


def tasks_path(shard: Path) -> Path:
    """Where the photos planned for a shard stand."""
    return shard.parent / FOLDER / f"{shard.name.removesuffix('.tar')}.jsonl"


def _known_items(plan: Plan | None) -> KnownItems:
    """The items that a plan has."""
    if plan is None:
        return KnownItems()
    shards = map(plan.shard, range(len(plan.digests)))
    planned = (b"".join({mark_of(task.item_id) for task in read_tasks(shard)}) for shard in shards)
    photoless = (_photoless_path(plan.folder, number) for number in range(len(plan.generations)))
    # A generation without such items has no file, nor has one of an older version.
    return KnownItems(planned, (path.read_bytes() for path in photoless if path.exists()))


def _photoless_path(folder: Path, generation: int) -> Path:
    """Where the marks of the items without a photo stand that a reading of the catalogue has found."""
    return folder / FOLDER / f"without-photo-{generation:06d}.marks"


def _identity(settings: PlanSettings) -> dict[str, Any]:
    """The settings as plain values; a file of ids by what is in it."""
    values = asdict(settings)
    values |= {f"photo.{name}": value for name, value in values.pop("photo").items()}
    if not values["columns"]:
        # Plans of catalogues are as they were before tables were read.
        del values["columns"]
    if settings.ids is not None:
        values["ids"] = hashlib.sha256("\n".join(read_ids(settings.ids)).encode()).hexdigest()[:16]
    plain: dict[str, Any] = json.loads(json.dumps(values, default=sorted))
    return plain


def _completed(old: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a plan, with the defaults of those that its version of lavic did not have yet."""
    required = PlanSettings(set="", split="", photos_per_shard=1, photos="first", image_size="hi_res")
    defaults = _identity(replace(required, photo=asdict(PhotoSettings())))
    return {**{name: defaults.get(name) for name in chosen}, **old}


def _changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [*new, *(name for name in old if name not in new)]
    return [
        f"--{name.replace('_', '-')} was {_shown(old.get(name))} and is {_shown(new.get(name))}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        words = (f"{name}={part:g}" if isinstance(part, float) else f"{name}={part}" for name, part in value.items())
        return " ".join(words) or "not given"
    return "not given" if value is None else str(value)


def _refuse(old: Plan, changes: list[str], hint: str = "") -> None:
    if changes:
        what = "; ".join(changes)
        raise ConfigError(
            f"{old.folder} was planned from another input: {what}; use another --out, or the same input{hint}"
        )


def _nothing_planned(items: tuple[str, ...], settings: PlanSettings, counts: Counts, rejects: Rejects) -> str:
    reasons = {
        f"{counts.without_photo:,} of them without a photo URL": counts.without_photo,
        f"{counts.unlinked:,} entries of their lists of images without a link": counts.unlinked,
        f"{counts.ids_missing:,} ids of {settings.ids} are not in the catalogue": counts.items and counts.ids_missing,
        f"{counts.rejected:,} records cannot be read, see {rejects.path}": counts.rejected,
    }
    if settings.ids is not None and not counts.items:
        what = f"no photo to fetch: none of the ids in {settings.ids} is in the catalogue"
    elif settings.splits and not counts.items:
        what = f"no photo to fetch: no item of the catalogue falls into the split {settings.split}"
    else:
        what = f"no photo to fetch: {counts.items:,} items"
    return f"{', '.join(items)}: " + ", ".join([what, *(reason for reason, count in reasons.items() if count)])
