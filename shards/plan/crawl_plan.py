"""The plan of a crawl: the photos, their keys and their shards. Made before the first request, then only read.

`OUT/plan/<set>-<split>-NNNNNN.jsonl` holds one shard's photos; `OUT/plan/plan.json`, written last, holds what they were
made from. Names, membership, order and bytes of every shard depend on the plan alone, not on workers or time. Photos
that show the same picture are in one shard, so that one worker fetches it once for all of them. A plan that is extended
gets another generation with new shards; earlier shards stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lavic.data.catalog import find_files
from lavic.data.manifest import shard_name
from lavic.errors import ConfigError, DataError
from lavic.shards.image.normalize import PhotoSettings
from lavic.shards.plan.catalog_fingerprint import fingerprint, same_content, what_changed
from lavic.shards.plan.counts import NOT_ADDED, PlanCounts
from lavic.shards.plan.existing_items import ExistingItems
from lavic.shards.plan.external_dedup import hash64
from lavic.shards.plan.photo_tasks import (
    Captions,
    PhotoTask,
    PlanSettings,
    Rejects,
    read_ids,
    read_task,
    select_photos,
)
from lavic.shards.plan.task_spool import TaskSpool, split_into_shards
from lavic.storage.atomic import atomic_open, atomic_write
from lavic.storage.paths import is_remote

log = logging.getLogger(__name__)

FORMAT = "lavic-plan/2"
FOLDER = "plan"
NAME = "plan.json"
_LOG_S = 10.0
_MAY_DIFFER = ("limit", "ids")
"""Settings that may differ between generations: they select items and do not affect a shard's bytes."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The shards from one reading of a catalogue."""

    sources: Mapping[str, Mapping[str, Any]]
    """Fingerprints of the catalogue's files, by path."""
    limit: int | None
    ids: str | None
    counts: Mapping[str, int]
    """See `PlanCounts`."""
    shards: tuple[str, ...]
    """For each shard a digest of its photos and of the settings: equal digests mean equal bytes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A complete plan on disk."""

    folder: Path
    """Folder of the set; the plan is in its `plan/`."""
    settings: Mapping[str, Any]
    generations: tuple[Generation, ...]

    @cached_property
    def digests(self) -> list[str]:
        """Digests of the shards, by number."""
        return [digest for generation in self.generations for digest in generation.shards]

    @property
    def digest(self) -> str:
        """Digest of all planned photos and the settings."""
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()

    @property
    def counts(self) -> PlanCounts:
        """Over all generations."""
        total = PlanCounts()
        for generation in self.generations:
            for name, count in generation.counts.items():
                setattr(total, name, count + (0 if name in NOT_ADDED else getattr(total, name)))
        return total

    def shard(self, number: int) -> Path:
        """The path of a shard."""
        return self.folder / shard_name(self.settings["set"], self.settings["split"], number)

    def digested_settings(self, number: int) -> str:
        """The settings in a shard's digest, as JSON; empty for earlier generations, which may be of older versions."""
        return self._settings_text if number >= len(self.digests) - len(self.generations[-1].shards) else ""

    @cached_property
    def _settings_text(self) -> str:
        return json.dumps(self.settings, sort_keys=True)

    def tasks(self, number: int) -> list[PhotoTask]:
        """The photos planned for a shard, in order. Raises DataError as `read_tasks`."""
        return read_tasks(self.shard(number), self.digests[number], self.digested_settings(number))


def read_tasks(shard: Path, digest: str = "", settings: str = "") -> list[PhotoTask]:
    """The photos planned for a shard, in order.

    Args:
        shard: The path of its tar.
        digest: In the plan.
        settings: `Plan.digested_settings`; if they are empty, the digest is not compared.

    Raises:
        DataError: The file is missing, or is not the one that was planned.
    """
    path = tasks_path(shard)
    try:
        data = path.read_bytes()
        if settings and hashlib.sha256(settings.encode() + data).hexdigest() != digest:
            raise ValueError("it has changed")
        return [read_task(line) for line in data.splitlines(keepends=True)]
    except FileNotFoundError:
        problem = "is missing"
    except (ValueError, TypeError) as error:
        problem = f"is not the file that was planned ({error})"
    raise DataError(
        f"{path} {problem}: restore it, or remove {path.parent} and run the crawl again with the same catalogue and "
        "settings; it keeps shards for which that makes the same plan"
    )


def make_plan(
    items: tuple[str, ...], folder: Path, settings: PlanSettings, *, extend: bool = False, max_rejected: int = 100
) -> Plan:
    """The plan of a folder, which is made if there is none.

    Args:
        items: The catalogue's files.
        folder: Of the set.
        settings: Those that affect the shards' bytes.
        extend: If the catalogue is not that of the plan, add the items that the plan does not have.
        max_rejected: Most unreadable records that are accepted.

    Raises:
        ConfigError: The folder has a plan from another catalogue or other settings; the message names them.
        DataError: The catalogue cannot be read, or has no photo to fetch.
    """
    chosen = _identity(settings)
    selection = {name: chosen.pop(name) for name in _MAY_DIFFER}
    old = load_plan(folder)
    last = old.generations[-1] if old else None
    if old and chosen["text"] == "auto":
        # Later photos follow the choice for the first ones.
        text = old.settings.get("text", "catalogue")
        chosen["text"] = "auto" if text == "none" else text
    sources = {path: fingerprint(path, last.sources if last else {}) for path in find_files(items)}
    if old and last:
        _refuse(old, _changed_settings(_with_defaults(old.settings, chosen), chosen))
        changes = _changed_settings({name: getattr(last, name) for name in _MAY_DIFFER}, selection)
        if not same_content(last.sources, sources):
            changes.insert(0, what_changed(last.sources, sources))
        if not changes:
            return old
        if not extend:
            _refuse(old, changes, ", or --extend to add new items")
    first = len(old.digests) if old else 0
    if not is_remote(folder):
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    rejects, counts, existing = Rejects(folder, max_rejected), PlanCounts(), _existing_items(old)
    captions = Captions(chosen["text"])
    digests: list[str] = []
    parent = None if is_remote(folder) else folder / FOLDER
    with tempfile.TemporaryDirectory(prefix=".tasks.", suffix=".part", dir=parent) as scratch:
        spool = TaskSpool(Path(scratch))
        logged = time.monotonic()
        for task in select_photos(items, settings, counts, rejects, existing, captions):
            spool.add(task)
            if time.monotonic() - logged > _LOG_S:
                logged = time.monotonic()
                log.info("planning: %s photos of %s items so far", f"{len(spool):,}", f"{counts.items:,}")
        rejects.write()
        chosen["text"], spool.untitled = captions.text, captions.withdrawn
        for lines in split_into_shards(spool.groups(settings.photos_per_shard, counts), settings.photos_per_shard):
            digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode())
            shard = folder / shard_name(settings.set, settings.split, first + len(digests))
            with atomic_open(tasks_path(shard)) as file:
                for line in lines:
                    digest.update(line)
                    file.write(line)
            digests.append(digest.hexdigest())
    if not counts.photos and not old:
        raise DataError(_nothing_planned(items, settings, counts, rejects))
    if existing.new_photoless:
        atomic_write(_photoless_path(folder, len(old.generations) if old else 0), bytes(existing.new_photoless))
    generation = Generation(sources=sources, **selection, counts=asdict(counts), shards=tuple(digests))
    plan = Plan(folder=folder, settings=chosen, generations=(*(old.generations if old else ()), generation))
    body = {"format": FORMAT, "settings": plan.settings, "generations": [asdict(part) for part in plan.generations]}
    atomic_write(folder / FOLDER / NAME, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    return plan


def load_plan(folder: Path) -> Plan | None:
    """The plan of a folder, or None if there is none or it was never finished.

    Raises:
        DataError: It is of another version, or broken.
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
    """The path of a shard's planned photos."""
    return shard.parent / FOLDER / f"{shard.name.removesuffix('.tar')}.jsonl"


def _existing_items(plan: Plan | None) -> ExistingItems:
    """The items of a plan."""
    if plan is None:
        return ExistingItems()
    planned = (b"".join({hash64(task.item_id) for task in plan.tasks(n)}) for n in range(len(plan.digests)))
    photoless = (_photoless_path(plan.folder, number) for number in range(len(plan.generations)))
    # Generations without such items, and those of older versions, have no file.
    return ExistingItems(planned, (path.read_bytes() for path in photoless if path.exists()))


def _photoless_path(folder: Path, generation: int) -> Path:
    """The path of the hashes of a generation's items without a photo."""
    return folder / FOLDER / f"without-photo-{generation:06d}.marks"


def _identity(settings: PlanSettings) -> dict[str, Any]:
    """The settings as plain values; a file of ids by its content."""
    values = asdict(settings)
    values |= {f"photo.{name}": value for name, value in values.pop("photo").items()}
    if not values["columns"]:
        # Plans of catalogues stay as they were before tables were supported.
        del values["columns"]
    if settings.ids is not None:
        values["ids"] = hashlib.sha256("\n".join(read_ids(settings.ids)).encode()).hexdigest()[:16]
    identity: dict[str, Any] = json.loads(json.dumps(values, default=sorted))
    return identity


def _with_defaults(old: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a plan, with defaults for those that its version of lavic did not have."""
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
        changed = "; ".join(changes)
        raise ConfigError(
            f"{old.folder} was planned from another input: {changed}; use another --out, or the same input{hint}"
        )


def _nothing_planned(items: tuple[str, ...], settings: PlanSettings, counts: PlanCounts, rejects: Rejects) -> str:
    reasons = {
        f"{counts.without_photo:,} of them without a photo URL": counts.without_photo,
        f"{counts.unlinked:,} entries of their lists of images without a link": counts.unlinked,
        f"{counts.ids_missing:,} ids of {settings.ids} are not in the catalogue": counts.items and counts.ids_missing,
        f"{counts.rejected:,} records cannot be read, see {rejects.path}": counts.rejected,
    }
    if settings.ids is not None and not counts.items:
        problem = f"no photo to fetch: none of the ids in {settings.ids} is in the catalogue"
    elif settings.splits and not counts.items:
        problem = f"no photo to fetch: no item of the catalogue falls into the split {settings.split}"
    else:
        problem = f"no photo to fetch: {counts.items:,} items"
    message = f"{', '.join(items)}: " + ", ".join([problem, *(reason for reason, count in reasons.items() if count)])
    if counts.without_photo and not counts.unlinked and not settings.columns:
        message += "; --columns url=KEY names the key of the links where it is not `images`"
    return message
