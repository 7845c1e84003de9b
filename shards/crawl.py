"""`lavic crawl`: a catalogue's photos over HTTP into WebDataset shards, as a Ray Data job.

lavic crawl --items item2meta_train.json --out shards/train
lavic crawl --items item2meta_train.json --out shards/train            # after a crash: goes on
lavic crawl --items item2meta_train.json --out shards/train --retry timeout throttled
"""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from pydantic import Field, field_validator

from lavic import __version__
from lavic.config import flatten, parse, settings
from lavic.data import manifest as manifests
from lavic.data.atomic import sweep
from lavic.data.manifest import Manifest, ShardEntry
from lavic.data.records import ImageSize
from lavic.errors import ConfigError, LavicError
from lavic.shards.cluster import RaySettings, ray_session
from lavic.shards.fetch import FetchSettings
from lavic.shards.outcomes import KINDS, advice, table
from lavic.shards.pack import Seal, pack_shard, read_seal
from lavic.shards.photo import PhotoSettings
from lavic.shards.plan import Plan, PlanSettings, make_plan
from lavic.shards.progress import Progress
from lavic.tracking import Tracker, TrackingSettings

DESCRIPTION = """Fetch a catalogue's photos over HTTP and pack them into WebDataset shards.

Which photo goes where is planned before the first request, so the shards' bytes do not depend on the number of
workers or on restarts: after a crash the same command goes on, and after the end it has nothing to do. Every planned
photo has a row in its shard's ledger, OUT/<set>-<split>-NNNNNN.ledger.jsonl, that says what became of it; `--retry
KINDS` fetches those again that failed in a way you have mended. The set is whole when OUT/manifest.json stands;
`lavic verify OUT` checks it.
"""

log = logging.getLogger(__name__)


@settings
class Settings:
    """Fetch a catalogue's photos and pack them into WebDataset shards."""

    items: tuple[str, ...] = Field(min_length=1)
    """Catalogue files: LaViC item2meta_*.json[l], Amazon Reviews 2023 meta_*.jsonl[.gz], parquet; paths, globs, URIs
    such as s3://..."""
    out: Path
    """Folder of the set."""
    set: str = Field(default="photos", pattern=r"^[A-Za-z0-9_]+$")
    """First part of the shards' names."""
    split: str = Field(default="train", pattern=r"^[A-Za-z0-9_]+$")
    """Second part of the shards' names."""
    photos_per_shard: int = Field(default=1000, ge=1, le=100_000)
    """Planned photos in one shard; it holds as many as could be fetched."""
    images_per_item: int = Field(default=1, ge=0)
    """Photos of an item, from its first; 0 takes all."""
    image_size: ImageSize = "hi_res"
    """Which link of a photo to take where there are several; the largest of the others where it is missing."""
    limit: int | None = Field(default=None, ge=1)
    """Plan only the first so many items."""
    ids: Path | None = None
    """Plan only the items in this file, one id on each line."""
    retry: tuple[str, ...] = ()
    """Fetch again the photos that ended under these names, as `timeout throttled`; their shards are packed anew."""
    fetch: FetchSettings = FetchSettings()
    """How photos are fetched."""
    photo: PhotoSettings = PhotoSettings()
    """Which photos are taken, and how they are stored."""
    ray: RaySettings = RaySettings()
    """Where the job runs."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the run is recorded."""

    @field_validator("retry")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        named = tuple(kind for word in kinds for kind in word.split(",") if kind)
        if wrong := [kind for kind in named if kind not in KINDS or kind == "ok"]:
            raise ValueError(f"{', '.join(wrong)} cannot be tried again; known: {', '.join(KINDS[1:])}")
        return named


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    crawl(parse(Settings, argv, command="crawl", description=DESCRIPTION))
    return 0


def crawl(settings: Settings) -> Manifest:
    """Make the set that the settings describe, or what is missing of it.

    Raises:
        ConfigError: The folder belongs to another plan, or to a crawl that is running.
        DataError: The catalogue cannot be read.
        LavicError: The folder cannot be written to, or not a single photo could be stored.
    """
    began = time.monotonic()
    with _alone(settings.out):
        try:
            return _crawl(settings, began)
        except OSError as error:
            raise _unwritable(settings.out, str(error)) from None


def _crawl(settings: Settings, began: float) -> Manifest:
    plan = _plan(settings)
    seals = {number: read_seal(plan.shard(number), plan.digest) for number in range(plan.shards)}
    todo = [number for number, seal in seals.items() if seal is None or any(map(seal.outcomes.get, settings.retry))]
    if todo:
        # A set that is being changed is not whole.
        (settings.out / manifests.NAME).unlink(missing_ok=True)
        if len(todo) < plan.shards:
            log.info("%d of %d shards are whole already", plan.shards - len(todo), plan.shards)
        with Tracker.open(settings.out, settings.tracking) as tracker:
            tracker.start("crawl", flatten(settings), {"plan": plan.digest})
            seals |= _make(plan, todo, seals, settings, tracker)
    else:
        log.info("every shard is whole already; nothing to fetch")
    whole = [seal for seal in seals.values() if seal is not None]
    manifest = _finish(plan, whole)
    _report(manifest, [whole[number] for number in todo], time.monotonic() - began)
    return manifest


def _plan(settings: Settings) -> Plan:
    plan = make_plan(
        settings.items,
        settings.out,
        PlanSettings(
            set=settings.set,
            split=settings.split,
            photos_per_shard=settings.photos_per_shard,
            images_per_item=settings.images_per_item,
            image_size=settings.image_size,
            limit=settings.limit,
            ids=settings.ids,
            photo=asdict(settings.photo),
        ),
    )
    notes = {
        "items without a photo URL": plan.without_photo,
        "repeated photos left out": plan.repeated,
        "ids not in the catalogue": plan.ids_missing,
    }
    more = "".join(f"; {count:,} {what}" for what, count in notes.items() if count)
    log.info(
        "planned %s photos of %s items in %s shards%s",
        *(f"{n:,}" for n in (plan.photos, plan.items, plan.shards)),
        more,
    )
    return plan


def _make(
    plan: Plan, todo: Sequence[int], seals: dict[int, Seal | None], settings: Settings, tracker: Tracker
) -> dict[int, Seal | None]:
    """Make the shards of `todo` as one Ray Data job, one shard a task."""
    settled: Counter[str] = Counter()
    for number, seal in seals.items():
        if seal is not None and number not in set(todo):
            settled.update(seal.outcomes)
    made: dict[int, Seal | None] = {}
    with ray_session(settings.ray), Progress(plan.photos, settled) as progress:
        import ray.data

        rows = ray.data.from_items([{"number": number} for number in todo], override_num_blocks=len(todo))
        job = rows.map(_make_one, fn_args=(plan, settings), num_cpus=1, concurrency=settings.ray.workers)
        for row in job.iter_rows():
            if row["error"]:
                raise _unwritable(settings.out, row["error"])
            made[row["number"]] = seal = _unpack(row["seal"])
            progress.add(seal.outcomes, began=seal.began)
            tracker.log(
                progress.done,
                photos_per_second=progress.rate,
                **{f"outcome.{kind}": count for kind, count in progress.outcomes.items()},
            )
    return made


def _make_one(row: dict[str, int], plan: Plan, settings: Settings) -> dict[str, object]:
    """Runs in a Ray worker. A folder that cannot be written to is a value, so that the driver ends with one line."""
    try:
        seal = pack_shard(plan.shard(row["number"]), plan.digest, settings.fetch, settings.photo, settings.retry)
    except OSError as error:
        return {"number": row["number"], "seal": "", "error": str(error)}
    return {"number": row["number"], "seal": json.dumps(asdict(seal)), "error": ""}


def _unpack(text: str) -> Seal:
    body = json.loads(text)
    return Seal(**{**body, "entry": ShardEntry(**body["entry"])})


def _finish(plan: Plan, seals: Sequence[Seal]) -> Manifest:
    """Write the manifest: the set is whole."""
    outcomes: Counter[str] = Counter()
    for seal in seals:
        outcomes.update(seal.outcomes)
    manifest = Manifest(
        folder=plan.folder,
        set=plan.settings["set"],
        split=plan.settings["split"],
        shards=tuple(seal.entry for seal in seals if seal.entry.samples),
        plan=plan.digest,
        outcomes=dict(outcomes),
        versions={"lavic": __version__, **{name: version(name) for name in ("aiohttp", "pillow", "ray")}},
    )
    if not manifest.samples:
        print(table(outcomes))
        raise LavicError(f"not one photo was stored: {advice(outcomes)}")
    manifest.save()
    return manifest


def _report(manifest: Manifest, made: Sequence[Seal], seconds: float) -> None:
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(f"{manifest.folder}: {manifest.samples:,} photos in {len(manifest.shards):,} shards, {size:,.1f} MB")
    print(table(manifest.outcomes))
    if made:
        photos = sum(seal.photos for seal in made)
        steady = photos / max(1e-9, max(seal.ended for seal in made) - min(seal.began for seal in made))
        print(f"{photos:,} photos in {seconds:.1f} s, start-up included; {steady:,.0f} photos/s from first to last")
    if hint := advice(manifest.outcomes):
        print(hint)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder against a second crawl, and clear what killed ones left."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise _unwritable(out, str(error)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{out}: another crawl is writing to this folder; wait for it or use another --out"
            ) from None
        sweep(out)
        yield


def _unwritable(out: Path, reason: str) -> LavicError:
    return LavicError(f"{out}: cannot be written to ({reason}); mend that and run the same command again, it goes on")
