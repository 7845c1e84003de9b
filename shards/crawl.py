"""`lavic crawl`: a catalogue's photos over HTTP into WebDataset shards, as a Ray Data job.

lavic crawl --items item2meta_train.json --out shards/train
lavic crawl --items item2meta_train.json --out shards/train            # after a crash: goes on
lavic crawl --items item2meta_train.json --out shards/train --retry timeout throttled
"""

from __future__ import annotations

import gc
import hashlib
import logging
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lavic import __version__
from lavic.config import flatten, parse, settings
from lavic.data import manifest as manifests
from lavic.data.cache import cache_folder
from lavic.data.manifest import Manifest
from lavic.data.place import is_remote, place, sizes, storage_errors
from lavic.data.records import ImageSize
from lavic.errors import LavicError, Stopped, first_line
from lavic.journal import FILE as JOURNAL
from lavic.shards.broker import RayBroker
from lavic.shards.cluster import RaySettings, ray_session
from lavic.shards.fetch import FetchSettings
from lavic.shards.outcomes import KINDS, advice, table
from lavic.shards.owner import Superseded, check, owned, unwritable
from lavic.shards.pack import Seal, pack_seal, pack_shard, read_seal, unpack_seal
from lavic.shards.photo import PhotoSettings
from lavic.shards.plan import Plan, make_plan
from lavic.shards.progress import Progress, Tally
from lavic.shards.refer import refer
from lavic.shards.tasks import REJECTED, PlanSettings
from lavic.tracking import Tracker, TrackingSettings

DESCRIPTION = """Fetch a catalogue's photos over HTTP and pack them into WebDataset shards.

Which photo goes where is planned before the first request, so the shards' bytes do not depend on the number of
workers or on restarts: after a crash the same command goes on, and after the end it has nothing to do. Every planned
photo has a row in its shard's ledger, OUT/<set>-<split>-NNNNNN.ledger.jsonl, that says what became of it; `--retry
KINDS` fetches those again that failed in a way you have mended. The set is whole when OUT/manifest.json stands;
`lavic verify OUT` checks it. OUT may be an address such as s3://bucket/prefix.

A picture that several links show, Amazon's in another size for instance, is fetched once; each photo has its sample.
Records of the catalogue that cannot be read are named in OUT/rejected.jsonl. A catalogue that has grown is taken in
with `--extend`: its new items become new shards, the old ones stay.

A host is asked for --fetch.host-rate photos a second by all workers together, fewer when it answers 429 or 503, none
where its robots.txt or an answer's header says so. Say who you are with --fetch.contact.
"""

_JOURNAL_S = 2.0
_PORTION = 16
"""Shards of a task, at most: when a worker dies, those it had made of them are made again, from what they hold."""

Row = dict[str, Any]

log = logging.getLogger(__name__)


@settings
class Settings:
    """Fetch a catalogue's photos and pack them into WebDataset shards."""

    items: tuple[str, ...] = Field(min_length=1)
    """Catalogue files: LaViC item2meta_*.json[l], Amazon Reviews 2023 meta_*.jsonl[.gz], parquet; paths, globs, URIs
    such as s3://..."""
    out: str
    """Folder of the set, or an address such as s3://bucket/prefix."""
    set: str = Field(default="photos", pattern=r"^[A-Za-z0-9_]+$")
    """First part of the shards' names."""
    split: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_]+$")
    """Second part of the shards' names, by default `train`. With --splits: the one of them to make, by default each."""
    splits: tuple[str, ...] = ()
    """Parts of the items, as `train=0.9 valid=0.1`: each becomes a set of its own in OUT/<name>. The item's id alone
    decides, so no item is in two. Shares that sum up to less than 1 leave items out."""
    photos_per_shard: int = Field(default=1000, ge=1, le=100_000)
    """Planned photos in one shard; it holds as many as could be fetched."""
    photos: str = Field(default="first", pattern=r"^(first|all|[1-9]\d{0,5})$")
    """Photos of an item: `first`, `all`, or how many from its first."""
    image_size: ImageSize = "hi_res"
    """Which link of a photo to take where there are several; the largest of the others where it is missing."""
    text: Literal["catalogue", "none"] = "catalogue"
    """What the txt members hold: the catalogue's description of the photo where it has one, or nothing. With none, a
    catalogue that has descriptions gives the same shards as one of the same items without."""
    duplicates: Literal["stored", "referenced"] = "stored"
    """Photos with the same bytes: each is stored in its own sample, so that any reader of tars finds every item; or the
    first of them is, and the others are rows in <shard>.references.jsonl, which `lavic embed` follows."""
    limit: int | None = Field(default=None, ge=1)
    """Plan only the first so many items."""
    ids: str | None = None
    """Plan only the items in this file, one id on each line."""
    max_rejected: int = Field(default=100, ge=0)
    """Records of the catalogue that may be broken; with more of them nothing is fetched."""
    extend: bool = False
    """Take in a catalogue that has changed since: items that are not in the set yet become shards of their own."""
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

    @field_validator("photos", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @model_validator(mode="after")
    def _parts(self) -> Settings:
        shares = self.shares
        if shares and self.split not in (None, *shares):
            raise ValueError(f"--split {self.split} is not one of --splits {' '.join(self.splits)}")
        if len(shares) != len(self.splits) or not all(0 < share <= 1 for share in shares.values()):
            raise ValueError(f"--splits takes different names with shares, as train=0.9 valid=0.1, got {self.splits}")
        if sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"--splits: the shares sum up to {sum(shares.values()):g}, more than 1")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Share of the items by split; empty where they are not parted."""
        found = [re.fullmatch(r"([A-Za-z0-9_]+)=(\d*\.?\d+)", word) for word in self.splits]
        return {match[1]: float(match[2]) for match in found if match}

    def each(self) -> Iterator[Settings]:
        """The settings of every set that these stand for."""
        if not self.splits:
            yield replace(self, split=self.split or "train")
        for name in self.shares:
            if self.split in (None, name):
                yield replace(self, split=name, out=f"{self.out.rstrip('/')}/{name}")

    @field_validator("retry")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        named = tuple(kind for word in kinds for kind in word.split(",") if kind)
        if wrong := [kind for kind in named if kind not in KINDS or kind == "ok"]:
            raise ValueError(f"{', '.join(wrong)} cannot be tried again; known: {', '.join(KINDS[1:])}")
        return named


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    chosen = parse(Settings, argv, command="crawl", description=DESCRIPTION)
    parts = list(chosen.each())
    with ExitStack() as stack:
        if len(parts) > 1:
            stack.enter_context(ray_session(chosen.ray))
        for part in parts:
            crawl(part)
    return 0


def crawl(settings: Settings) -> Manifest:
    """Make the set that the settings describe, or what is missing of it.

    Args:
        settings: Of one set, see `Settings.each`.

    Raises:
        ConfigError: The folder belongs to another plan, or to a crawl that is running.
        DataError: The catalogue cannot be read.
        LavicError: The folder cannot be written to, or not a single photo could be stored.
    """
    began = time.monotonic()
    folder = place(settings.out)
    with _heeding_stops(), owned(folder) as owner:
        try:
            return _crawl(folder, settings, owner, began)
        except storage_errors() as error:
            raise unwritable(folder, first_line(error)) from None


def _crawl(folder: Path, settings: Settings, owner: str, began: float) -> Manifest:
    plan = _plan(folder, settings)
    seals = _seals(plan)
    todo = [number for number, seal in enumerate(seals) if seal is None or any(map(seal.outcomes.get, settings.retry))]
    if todo:
        # A set that is being changed is not whole.
        (folder / manifests.NAME).unlink(missing_ok=True)
        if len(todo) < len(seals):
            log.info("%d of %d shards are whole already", len(seals) - len(todo), len(seals))
        with _tracker(folder, settings) as tracker:
            tracker.start("crawl", flatten(settings), {"plan": plan.digest})
            for number, seal in _make(plan, todo, seals, settings, owner, tracker):
                seals[number] = seal
    else:
        log.info("every shard is whole already; nothing to fetch")
    whole = [seal for seal in seals if seal is not None]
    assert len(whole) == len(seals), "a shard was not made"
    if settings.duplicates == "referenced":
        if todo:
            log.info("looking for photos with the same bytes")
        whole = refer(plan, whole)
    manifest = _finish(plan, whole)
    _report(manifest, [whole[number] for number in todo], time.monotonic() - began)
    return manifest


def _plan(folder: Path, settings: Settings) -> Plan:
    plan = make_plan(
        settings.items,
        folder,
        PlanSettings(
            set=settings.set,
            split=settings.split or "train",
            splits=settings.shares,
            photos_per_shard=settings.photos_per_shard,
            photos=settings.photos,
            image_size=settings.image_size,
            text=settings.text,
            duplicates=settings.duplicates,
            limit=settings.limit,
            ids=settings.ids,
            photo=asdict(settings.photo),
        ),
        extend=settings.extend,
        max_rejected=settings.max_rejected,
    )
    counts = plan.counts
    notes = {
        "items without a photo URL": counts.without_photo,
        "repeated photos left out": counts.repeated,
        "photos that show the picture of another and are fetched with it": counts.shared,
        f"records that cannot be read, see {REJECTED}": counts.rejected,
        "ids not in the catalogue": counts.ids_missing,
    }
    more = "".join(f"; {count:,} {what}" for what, count in notes.items() if count)
    total = (counts.photos, counts.items, len(plan.digests))
    log.info("planned %s photos of %s items in %s shards%s", *(f"{n:,}" for n in total), more)
    return plan


def _seals(plan: Plan) -> list[Seal | None]:
    """For each shard its seal, or None where it is not whole."""
    found = sizes(plan.folder)
    with ThreadPoolExecutor(16, "seals") as pool:
        return list(pool.map(lambda one: read_seal(plan.shard(one[0]), one[1], found), enumerate(plan.digests)))


@contextmanager
def _tracker(folder: Path, settings: Settings) -> Iterator[Tracker]:
    """Reports to the journal in the set's folder. That of a set in an object store is kept here and copied there."""
    run = folder
    if is_remote(folder):
        run = cache_folder() / "runs" / hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        run.mkdir(parents=True, exist_ok=True)
    try:
        with Tracker.open(run, settings.tracking) as tracker:
            yield tracker
    finally:
        if run is not folder:
            with (run / JOURNAL).open("rb") as source, (folder / JOURNAL).open("wb") as copy:
                shutil.copyfileobj(source, copy)


def _make(
    plan: Plan, todo: Sequence[int], seals: Sequence[Seal | None], settings: Settings, owner: str, tracker: Tracker
) -> Iterator[tuple[int, Seal]]:
    """Make the shards of `todo` as one Ray Data job, a few of them a task; gives their numbers and seals."""
    settled: Counter[str] = Counter()
    again = frozenset(todo)
    for number, seal in enumerate(seals):
        if seal is not None and number not in again:
            settled.update(seal.outcomes)
    with ray_session(settings.ray):
        import pyarrow as pa
        import ray
        import ray.data

        tally = _tally(ray)
        digests = plan.digests
        rows = [{"number": n, "shard": plan.shard(n).name, "digest": digests[n]} for n in todo]
        workers = settings.ray.workers or int(ray.cluster_resources().get("CPU", 1))
        job = ray.data.from_arrow([pa.Table.from_pylist(portion) for portion in _portions(rows, workers)]).map(
            _make_one,
            fn_args=(settings, owner, RayBroker(settings.fetch.limits), tally),
            num_cpus=1,
            concurrency=settings.ray.workers,
        )
        noted = 0.0
        with Progress(plan.counts.photos, settled, running=lambda: _running(ray, tally)) as progress:
            for row in job.iter_rows():
                if row["error"]:
                    raise LavicError(row["error"]) if row["taken"] else unwritable(plan.folder, row["error"])
                seal = unpack_seal(row["seal"])
                progress.add(row["number"], seal.outcomes, began=seal.began)
                if time.monotonic() - noted > _JOURNAL_S:
                    noted = time.monotonic()
                    _note(tracker, progress)
                yield row["number"], seal
            _note(tracker, progress)


def _portions(rows: Sequence[Row], workers: int) -> Iterator[Sequence[Row]]:
    """What a task makes one after the other, fewer and fewer: Ray takes tenths of a second from a task to the next.

    The last portions are single shards, so that no worker is left with several when the others are done.
    """
    at = 0
    while at < len(rows):
        size = max(1, min(_PORTION, (len(rows) - at) // (4 * workers)))
        yield rows[at : at + size]
        at += size


def _tally(ray: Any) -> Any:
    """The actor that workers tell how far they are; beside the driver, so that it is lost with it alone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Tally).remote()


def _note(tracker: Tracker, progress: Progress) -> None:
    outcomes = progress.outcomes
    tracker.log(
        outcomes.total(),
        photos_per_second=progress.rate,
        **{f"outcome.{kind}": count for kind, count in outcomes.items()},
    )


def _running(ray: Any, tally: Any) -> Mapping[int, Mapping[str, int]]:
    """What the workers last said; nothing while the tally is moved from a lost machine."""
    try:
        return ray.get(tally.get.remote(), timeout=2.0)
    except ray.exceptions.RayError:
        return {}


@lru_cache(maxsize=1)
def _freeze() -> None:
    """Leave what Ray and its libraries have loaded out of the garbage collector's rounds: a tenth of a photo's time."""
    gc.freeze()


def _make_one(row: dict[str, Any], settings: Settings, owner: str, office: RayBroker, tally: Any) -> dict[str, object]:
    """Runs in a Ray worker. A folder that cannot be written to is a value, so that the driver ends with one line."""
    _freeze()
    folder = place(settings.out)
    made = {"number": row["number"], "seal": "", "error": "", "taken": False}
    try:
        seal = pack_shard(
            folder / row["shard"],
            row["digest"],
            settings.fetch,
            settings.photo,
            settings.retry,
            office=office,
            report=lambda counts: tally.put.remote(row["number"], dict(counts)),
            publish=lambda: check(folder, owner),
        )
        return {**made, "seal": pack_seal(seal)}
    except Superseded as error:
        return {**made, "error": str(error), "taken": True}
    except storage_errors() as error:
        return {**made, "error": first_line(error)}


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
        references=outcomes["ok"] - sum(seal.entry.samples for seal in seals),
        versions={"lavic": __version__, **{name: version(name) for name in ("aiohttp", "pillow", "ray")}},
    )
    if not manifest.samples:
        print(table(outcomes))
        raise LavicError(f"not one photo was stored: {advice(outcomes)}")
    manifest.save()
    return manifest


def _report(manifest: Manifest, made: Sequence[Seal], seconds: float) -> None:
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    more = f" and {manifest.references:,} that refer to them" if manifest.references else ""
    print(f"{manifest.folder}: {manifest.samples:,} photos{more} in {len(manifest.shards):,} shards, {size:,.1f} MB")
    print(table(manifest.outcomes))
    if made:
        photos = sum(seal.photos for seal in made)
        steady = photos / max(1e-9, max(seal.ended for seal in made) - min(seal.began for seal in made))
        print(f"{photos:,} photos in {seconds:.1f} s, start-up included; {steady:,.0f} photos/s from first to last")
    if hint := advice(manifest.outcomes):
        print(hint)


@contextmanager
def _heeding_stops() -> Iterator[None]:
    """Let a scheduler's warning end the crawl where it stands: whole shards are kept, the others are made again."""

    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt  # which Ray lets through; of an error of ours it would make a report

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        yield
    except KeyboardInterrupt:
        if asked:
            raise Stopped("stopped on request; whole shards are kept; run the same command again to go on") from None
        raise
    finally:
        signal.signal(signal.SIGUSR1, before)
