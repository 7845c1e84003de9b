"""`lavic crawl`: fetches a catalogue's photos over HTTP into WebDataset shards, on Ray or in local processes.

lavic crawl --items item2meta_train.json --out shards/train
lavic crawl --items item2meta_train.json --out shards/train            # after a crash: continues
lavic crawl --items item2meta_train.json --out shards/train --retry timeout throttled
lavic crawl --items item2meta_train.json --out shards/train --dry-run
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from lavic.config import flatten, parse
from lavic.data.manifest import NAME, Manifest
from lavic.distributed.ray_session import ray_session
from lavic.errors import DataError
from lavic.shards.cluster import local_processes
from lavic.shards.cluster.executor import stop_on_signal, uses_ray
from lavic.shards.cluster.shard_job import make_shards
from lavic.shards.cluster.worker_process import prepare
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.http.connections import check_connection_settings
from lavic.shards.image.near_duplicates import NAME as NEAR_DUPLICATES
from lavic.shards.image.near_duplicates import report_near_duplicates
from lavic.shards.pack.dedup import deduplicate
from lavic.shards.pack.finalize import TooFewStored, finalize_set, finalize_splits, print_report
from lavic.shards.pack.outcomes import ALWAYS_RETRIED
from lavic.shards.pack.output_lock import lock_output
from lavic.shards.pack.refresh import begin_refresh, end_refresh
from lavic.shards.pack.seal import Seal, read_seal
from lavic.shards.plan.crawl_plan import Plan, make_plan
from lavic.shards.plan.dry_run import dry_run
from lavic.shards.plan.photo_tasks import REJECTED
from lavic.storage import format_bytes
from lavic.storage.cache.shard_cache import cache_folder
from lavic.storage.output_folder import not_writable
from lavic.storage.paths import as_path, file_sizes, is_remote, storage_errors
from lavic.tracking.journal import JOURNAL_FILE
from lavic.tracking.tracker import Tracker

DESCRIPTION = """Fetch a catalogue's photos over HTTP and pack them into WebDataset shards.

The shard of every photo is planned before the first request, so the shards' bytes do not depend on the number of
workers or on restarts: after a crash the same command continues, and after the end it has nothing to do. Every planned
photo has a row with its outcome in its shard's ledger, OUT/<set>-<split>-NNNNNN.ledger.jsonl; `--retry KINDS` fetches
photos again after you have fixed the cause. The set is complete when OUT/manifest.json exists; `lavic verify OUT`
checks it. If less than --min-success of the photos could be stored, it is not written and the exit code is 1. OUT may
be a URI such as s3://bucket/prefix.

A picture that several links lead to, for instance Amazon's in several sizes, is fetched once; each photo has its own
sample. Records of the catalogue that cannot be read are listed in OUT/rejected.jsonl. `--extend` adds the new items of
a catalogue that has grown as new shards; the old ones stay.

With --refresh the stored photos are requested again, by the ETag or Last-Modified that their servers sent, and those
that have changed are stored again; a photo that cannot be fetched again is kept.

--dry-run only prints how many photos would be fetched from which hosts, and how long their rate limits make that take.

A host gets at most --fetch.host-rate requests per second from all workers together, fewer if it answers 429 or 503,
and none that its robots.txt or a response header forbids. Say who you are with --fetch.contact.
"""

log = logging.getLogger(__name__)

SETTINGS = CrawlSettings
resolve = partial(parse, CrawlSettings, command="crawl", description=DESCRIPTION)
"""The settings of a command line; see `lavic.cli.command_module`."""

PHOTO_BYTES, SIDECAR_BYTES = 48_000, 2_500
"""Of a photo in a shard (500 pixels on the long side), and of its rows beside the shard: docs/scaling.md."""


def is_complete(settings: CrawlSettings) -> bool:
    """Whether every set that the settings describe has its manifest and all of its shards."""
    try:
        for part in settings.each():
            Manifest.load(part.out)
    except DataError:
        return False
    return True


def estimate(settings: CrawlSettings, *, expected: int | None = None) -> str:
    """How much the sets will hold, as lines of text; without a manifest yet, of `expected` photos."""
    try:
        photos: int | None = sum(Manifest.load(part.out, check=False).samples for part in settings.each())
    except DataError:
        photos = expected
    if photos is None:
        return "photos: not known yet"
    photo_bytes = PHOTO_BYTES + SIDECAR_BYTES
    size = f"{format_bytes(photos * photo_bytes)} of shards, at {format_bytes(photo_bytes)} a photo (docs/scaling.md)"
    return f"photos: {photos:,}\nbytes: {size}"


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    chosen = resolve(argv)
    check_connection_settings(chosen.fetch)
    parts = list(chosen.each())
    if chosen.dry_run:
        for part in parts:
            dry_run(part, partial(_plan, settings=part), _seals)
        return 0
    with ExitStack() as stack:
        if len(parts) > 1 and uses_ray(chosen.executor, chosen.ray):
            stack.enter_context(ray_session(chosen.ray))
        # The other sets are made too if one is not complete.
        failed: list[TooFewStored] = []
        for part in parts:
            try:
                crawl(part)
            except TooFewStored as error:
                failed.append(error)
    if chosen.splits:
        finalize_splits(as_path(chosen.out), chosen.shares)
    if failed:
        raise TooFewStored("\n".join(map(str, failed)))
    return 0


def crawl(settings: CrawlSettings) -> Manifest:
    """Make the set of the settings (one set, see `CrawlSettings.each`), or what is missing of it.

    Raises:
        ConfigError: The folder has another plan, or another crawl uses it.
        DataError: The catalogue cannot be read.
        TooFewStored: Too small a share of the photos could be stored; see `--min-success`.
        LavicError: The folder cannot be written to.
    """
    began = time.monotonic()
    folder = as_path(settings.out)
    if not uses_ray(settings.executor, settings.ray):
        prepare(local_processes.__name__)
    with stop_on_signal("complete shards"), lock_output(folder) as owner:
        try:
            return _crawl(folder, settings, owner, began)
        except storage_errors() as error:
            raise not_writable(folder, error) from None


def _crawl(folder: Path, settings: CrawlSettings, owner: str, began: float) -> Manifest:
    plan = _plan(folder, settings)
    seals = _seals(plan)
    refresh = begin_refresh(folder) if settings.refresh else ""
    retried = [_retried(seal, settings.retry, refresh) for seal in seals]
    to_make = [n for n, seal in enumerate(seals) if seal is None or any(map(seal.outcomes.get, retried[n]))]
    settled = [_settled(seal, kinds) for seal, kinds in zip(seals, retried, strict=True)]
    if to_make:
        # A set that is being changed is not complete, and has no report of near duplicates.
        for name in (NAME, NEAR_DUPLICATES):
            (folder / name).unlink(missing_ok=True)
        if len(to_make) < len(seals):
            log.info("%d of %d shards are complete already", len(seals) - len(to_make), len(seals))
        with _tracker(folder, settings) as tracker:
            tracker.start("crawl", flatten(settings), {"plan": plan.digest})
            for number, seal in make_shards(plan, to_make, settled, settings, owner, tracker, refresh):
                seals[number] = seal
    else:
        log.info("every shard is complete already; nothing to fetch")
    complete = [seal for seal in seals if seal is not None]
    assert len(complete) == len(seals), "a shard was not made"
    if settings.duplicates == "referenced":
        if to_make:
            log.info("searching photos with the same bytes")
        complete = deduplicate(plan, complete)
    private = settings.fetch.allow_private
    manifest = finalize_set(plan, complete, settings.min_success, allow_private=private)
    end_refresh(folder)
    new_seals = [complete[number] for number in to_make]
    requested = sum(seal.photos for seal in new_seals) - sum(sum(settled[number].values()) for number in to_make)
    print_report(manifest, complete, new_seals, requested, time.monotonic() - began, allow_private=private)
    if settings.near_duplicates:
        print(report_near_duplicates(manifest))
    return manifest


def _retried(seal: Seal | None, retry: Collection[str], refresh: str) -> frozenset[str]:
    """Outcomes of a shard's photos that are requested again."""
    stored = ("ok",) if refresh and seal is not None and seal.refresh != refresh else ()
    return ALWAYS_RETRIED.union(retry, stored)


def _settled(seal: Seal | None, retried: Collection[str]) -> dict[str, int]:
    """Photos of a shard by outcome that this run does not request, since an earlier one has settled them."""
    return {} if seal is None else {kind: count for kind, count in seal.outcomes.items() if kind not in retried}


def _plan(folder: Path, settings: CrawlSettings) -> Plan:
    extend, max_rejected = settings.extend, settings.max_rejected
    plan = make_plan(settings.items, folder, settings.planned, extend=extend, max_rejected=max_rejected)
    counts = plan.counts
    adjacent = " (rows of an id must be adjacent: sort the table by it)" if "id" in settings.named_columns else ""
    notes = {
        "items without a photo URL": counts.without_photo,
        "entries of lists of images without a link": counts.unlinked,
        f"repeated photos left out{adjacent}": counts.repeated,
        "photos with the picture of another one, fetched with it": counts.shared,
        f"records that cannot be read (see {REJECTED})": counts.rejected,
        "ids not in the catalogue": counts.ids_missing,
    }
    suffix = "".join(f"; {count:,} {note}" for note, count in notes.items() if count)
    total = (counts.photos, counts.items, len(plan.digests))
    log.info("planned %s photos of %s items in %s shards%s", *(f"{n:,}" for n in total), suffix)
    return plan


def _seals(plan: Plan) -> list[Seal | None]:
    """For each shard its seal, or None if it is not complete."""
    files = file_sizes(plan.folder)
    with ThreadPoolExecutor(16, "seals") as pool:
        shards = map(plan.shard, range(len(plan.digests)))
        return list(pool.map(lambda shard, digest: read_seal(shard, digest, files), shards, plan.digests))


@contextmanager
def _tracker(folder: Path, settings: CrawlSettings) -> Iterator[Tracker]:
    """Writes the journal into the set's folder; for an object store it is written here and copied there."""
    run = folder
    if is_remote(folder):
        run = cache_folder() / "runs" / hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        run.mkdir(parents=True, exist_ok=True)
    try:
        with Tracker.open(run, settings.tracking) as tracker:
            yield tracker
    finally:
        if run is not folder:
            with (run / JOURNAL_FILE).open("rb") as source, (folder / JOURNAL_FILE).open("wb") as copy:
                shutil.copyfileobj(source, copy)
