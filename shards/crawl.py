"""`lavic crawl`: a catalogue's photos over HTTP into WebDataset shards, as a Ray Data job or by local processes.

lavic crawl --items item2meta_train.json --out shards/train
lavic crawl --items item2meta_train.json --out shards/train            # after a crash: goes on
lavic crawl --items item2meta_train.json --out shards/train --retry timeout throttled
lavic crawl --items item2meta_train.json --out shards/train --dry-run
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from lavic.config.loader import flatten, parse
from lavic.data.manifest import NAME, Manifest
from lavic.distributed.ray_session import ray_session
from lavic.errors import Stopped, first_line
from lavic.shards.cluster.local_processes import prepare
from lavic.shards.cluster.shard_job import make_shards, uses_ray
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.http.connections import check_transport
from lavic.shards.image.near_duplicates import report_near_duplicates
from lavic.shards.pack.dedup import refer
from lavic.shards.pack.finalize import TooFewStored, close_set, close_splits, report
from lavic.shards.pack.outcomes import ASKED_AGAIN
from lavic.shards.pack.output_lock import owned, unwritable
from lavic.shards.pack.refresh import begin as begin_refresh
from lavic.shards.pack.refresh import end as end_refresh
from lavic.shards.pack.seal import Seal, read_seal
from lavic.shards.plan.crawl_plan import Plan, make_plan
from lavic.shards.plan.dry_run import dry_run
from lavic.shards.plan.photo_tasks import REJECTED
from lavic.storage.paths import is_remote, place, sizes, storage_errors
from lavic.storage.shard_cache import cache_folder
from lavic.tracking.journal import FILE as JOURNAL
from lavic.tracking.tracker import Tracker

DESCRIPTION = """Fetch a catalogue's photos over HTTP and pack them into WebDataset shards.

Which photo goes where is planned before the first request, so the shards' bytes do not depend on the number of
workers or on restarts: after a crash the same command goes on, and after the end it has nothing to do. Every planned
photo has a row in its shard's ledger, OUT/<set>-<split>-NNNNNN.ledger.jsonl, that says what became of it; `--retry
KINDS` fetches those again that failed in a way you have mended. The set is whole when OUT/manifest.json stands;
`lavic verify OUT` checks it. Where less than --min-success of the photos could be stored there is none, and the exit
code is 1. OUT may be an address such as s3://bucket/prefix.

A picture that several links show, Amazon's in another size for instance, is fetched once; each photo has its sample.
Records of the catalogue that cannot be read are named in OUT/rejected.jsonl. A catalogue that has grown is taken in
with `--extend`: its new items become new shards, the old ones stay.

With --refresh the stored photos are asked for again, by the ETag or Last-Modified that their servers sent, and those
that have changed are stored anew; a photo that cannot be had again is kept.

With --dry-run it only says how many photos it would fetch from which hosts, and how long their limits make that take.

A host is asked for --fetch.host-rate photos a second by all workers together, fewer when it answers 429 or 503, none
where its robots.txt or an answer's header says so. Say who you are with --fetch.contact.
"""

log = logging.getLogger(__name__)


SETTINGS = CrawlSettings
"""The command's settings, for `lavic.cli.settings_class`."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    chosen = parse(CrawlSettings, argv, command="crawl", description=DESCRIPTION)
    check_transport(chosen.fetch)
    parts = list(chosen.each())
    if chosen.dry_run:
        for part in parts:
            dry_run(part, partial(_plan, settings=part), _seals)
        return 0
    with ExitStack() as stack:
        if len(parts) > 1 and uses_ray(chosen, 0):
            stack.enter_context(ray_session(chosen.ray))
        # A set that is not whole does not keep the others from being made.
        failed: list[TooFewStored] = []
        for part in parts:
            try:
                crawl(part)
            except TooFewStored as error:
                failed.append(error)
    if chosen.splits:
        close_splits(place(chosen.out), chosen.shares)
    if failed:
        raise TooFewStored("\n".join(map(str, failed)))
    return 0


def crawl(settings: CrawlSettings) -> Manifest:
    """Make the set that the settings describe, or what is missing of it.

    Args:
        settings: Of one set, see `CrawlSettings.each`.

    Raises:
        ConfigError: The folder belongs to another plan, or to a crawl that is running.
        DataError: The catalogue cannot be read.
        TooFewStored: Too small a share of the photos could be stored; see `--min-success`.
        LavicError: The folder cannot be written to.
    """
    began = time.monotonic()
    folder = place(settings.out)
    if not uses_ray(settings, 0):
        prepare()
    with _heeding_stops(), owned(folder) as owner:
        try:
            return _crawl(folder, settings, owner, began)
        except storage_errors() as error:
            raise unwritable(folder, first_line(error)) from None


def _crawl(folder: Path, settings: CrawlSettings, owner: str, began: float) -> Manifest:
    plan = _plan(folder, settings)
    seals = _seals(plan)
    refresh = begin_refresh(folder) if settings.refresh else ""
    again = [_asked_again(seal, settings.retry, refresh) for seal in seals]
    todo = [n for n, seal in enumerate(seals) if seal is None or any(map(seal.outcomes.get, again[n]))]
    settled = [_settled(seal, kinds) for seal, kinds in zip(seals, again, strict=True)]
    if todo:
        # A set that is being changed is not whole.
        (folder / NAME).unlink(missing_ok=True)
        if len(todo) < len(seals):
            log.info("%d of %d shards are whole already", len(seals) - len(todo), len(seals))
        with _tracker(folder, settings) as tracker:
            tracker.start("crawl", flatten(settings), {"plan": plan.digest})
            for number, seal in make_shards(plan, todo, settled, settings, owner, tracker, refresh):
                seals[number] = seal
    else:
        log.info("every shard is whole already; nothing to fetch")
    whole = [seal for seal in seals if seal is not None]
    assert len(whole) == len(seals), "a shard was not made"
    if settings.duplicates == "referenced":
        if todo:
            log.info("looking for photos with the same bytes")
        whole = refer(plan, whole)
    private = settings.fetch.allow_private
    manifest = close_set(plan, whole, settings.min_success, allow_private=private)
    end_refresh(folder)
    made = [whole[number] for number in todo]
    asked = sum(seal.photos for seal in made) - sum(sum(settled[number].values()) for number in todo)
    report(manifest, whole, made, asked, time.monotonic() - began, allow_private=private)
    if settings.near_duplicates:
        print(report_near_duplicates(manifest))
    return manifest


def _asked_again(seal: Seal | None, retry: Collection[str], refresh: str) -> frozenset[str]:
    """Outcomes of a shard's photos that are asked for again."""
    stored = ("ok",) if refresh and seal is not None and seal.refresh != refresh else ()
    return ASKED_AGAIN.union(retry, stored)


def _settled(seal: Seal | None, again: Collection[str]) -> dict[str, int]:
    """Photos of a shard by outcome that this run does not ask for, since an earlier one has settled them."""
    return {} if seal is None else {kind: count for kind, count in seal.outcomes.items() if kind not in again}


def _plan(folder: Path, settings: CrawlSettings) -> Plan:
    extend, most = settings.extend, settings.max_rejected
    plan = make_plan(settings.items, folder, settings.planned, extend=extend, max_rejected=most)
    counts = plan.counts
    notes = {
        "items without a photo URL": counts.without_photo,
        "entries of lists of images without a link": counts.unlinked,
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
def _tracker(folder: Path, settings: CrawlSettings) -> Iterator[Tracker]:
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
