"""The shards of a plan as one job: on Ray, or, where few photos are left, by processes of this machine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from lavic.errors import LavicError
from lavic.shards.cluster.local_processes import on_processes
from lavic.shards.cluster.progress import CrawlProgress
from lavic.shards.cluster.worker import Job, shard_row
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.pack.output_lock import unwritable
from lavic.shards.pack.seal import Seal, unpack_seal
from lavic.shards.plan.crawl_plan import Plan
from lavic.tracking.tracker import Tracker

_JOURNAL_S = 2.0
"""Seconds between two lines of the journal."""
SMALL = 20_000
"""Photos; to fetch no more than these takes local processes about as long as Ray takes to start."""


def make_shards(
    plan: Plan,
    todo: Sequence[int],
    settled: Sequence[Mapping[str, int]],
    settings: CrawlSettings,
    owner: str,
    tracker: Tracker,
    refresh: str = "",
) -> Iterator[tuple[int, Seal]]:
    """Make shards, as they become whole.

    Args:
        plan: Of the set.
        todo: Numbers of the shards to make.
        settled: For every shard of the plan the photos by outcome that are not asked for again.
        settings: Of the crawl.
        owner: Whose crawl this is: no shard is put in place once the folder is another's.
        tracker: Told how the photos fare.
        refresh: Name of the refresh, if stored photos are to be asked for again.

    Yields:
        A shard's number and its seal.

    Raises:
        LavicError: The folder cannot be written to, or is another crawl's by now.
    """
    digests = plan.digests
    rows = [shard_row(n, plan.shard(n).name, digests[n], refresh) for n in todo]
    if uses_ray(settings, plan.counts.photos - sum(sum(counts.values()) for counts in settled)):
        from lavic.shards.cluster.ray_job import on_ray

        start = on_ray
    else:
        start = on_processes
    noted = 0.0
    with start(rows, settings, owner) as job, _progress(plan, settled, job) as progress:
        for row in job.made:
            if row["error"]:
                raise LavicError(row["error"]) if row["taken"] else unwritable(plan.folder, row["error"])
            seal = unpack_seal(row["seal"].encode())
            progress.add(row["number"], seal.outcomes, began=seal.began)
            if time.monotonic() - noted > _JOURNAL_S:
                noted = time.monotonic()
                _note(tracker, progress)
            yield row["number"], seal
        _note(tracker, progress)


def _progress(plan: Plan, settled: Sequence[Mapping[str, int]], job: Job) -> CrawlProgress:
    return CrawlProgress(plan.counts.photos, settled, running=job.running, waits=job.waits)


def uses_ray(settings: CrawlSettings, photos: int) -> bool:
    """Whether a crawl of so many photos runs on Ray: by its settings, else where a Ray is up or the crawl is large."""
    if settings.executor != "auto":
        return settings.executor == "ray"
    if settings.ray.address or settings.ray.nodes > 1 or os.environ.get("RAY_ADDRESS"):
        return True
    ray = sys.modules.get("ray")
    return photos > SMALL or bool(ray and ray.is_initialized())


def _note(tracker: Tracker, progress: CrawlProgress) -> None:
    outcomes = progress.outcomes
    tracker.log(
        outcomes.total(),
        photos_per_second=progress.rate,
        **{f"outcome.{kind}": count for kind, count in outcomes.items()},
    )
