"""Makes the shards of a plan: on Ray, or by local processes if there are few photos."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

from lavic.errors import LavicError
from lavic.shards.cluster.executor import uses_ray
from lavic.shards.cluster.local_processes import on_processes
from lavic.shards.cluster.progress import CrawlProgress
from lavic.shards.cluster.worker import shard_row
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.pack.seal import Seal, unpack_seal
from lavic.shards.plan.crawl_plan import Plan
from lavic.tracking.tracker import Tracker

_JOURNAL_S = 2.0
"""Seconds between two lines of the journal."""
MAX_LOCAL_PHOTOS = 20_000
"""Local processes fetch so many photos in about the time that Ray takes to start."""


def make_shards(
    plan: Plan,
    to_make: Sequence[int],
    settled: Sequence[Mapping[str, int]],
    settings: CrawlSettings,
    owner: str,
    tracker: Tracker,
    refresh: str = "",
) -> Iterator[tuple[int, Seal]]:
    """Make shards; yields them as they become complete.

    Args:
        plan: Of the set.
        to_make: Numbers of the shards to make.
        settled: For every shard of the plan the photos by outcome that are not requested again.
        settings: Of the crawl.
        owner: Of the folder; once it has another one, no shard is put in place.
        tracker: Gets the number of photos by outcome.
        refresh: Name of the refresh, if stored photos are to be requested again.

    Yields:
        A shard's number and its seal.

    Raises:
        LavicError: The folder cannot be written to, or another crawl has taken it over.
    """
    digests = plan.digests
    rows = [shard_row(n, plan.shard(n).name, digests[n], plan.digested_settings(n), refresh) for n in to_make]
    num_photos = plan.counts.photos - sum(sum(counts.values()) for counts in settled)
    if uses_ray(settings.executor, settings.ray, large=num_photos > MAX_LOCAL_PHOTOS):
        from lavic.shards.cluster.ray_job import on_ray

        start = on_ray
    else:
        start = on_processes
    logged = 0.0
    with ExitStack() as stack:
        job = stack.enter_context(start(rows, settings, owner))
        progress = stack.enter_context(
            CrawlProgress(plan.counts.photos, settled, running=job.running, waits=job.wait_reasons)
        )
        for row in job.made:
            if row["error"]:
                raise LavicError(row["error"])
            seal = unpack_seal(row["seal"].encode())
            progress.add(row["number"], seal.outcomes, began=seal.began)
            if time.monotonic() - logged > _JOURNAL_S:
                logged = time.monotonic()
                _log(tracker, progress)
            yield row["number"], seal
        _log(tracker, progress)


def _log(tracker: Tracker, progress: CrawlProgress) -> None:
    outcomes = progress.outcomes
    tracker.log(
        outcomes.total(),
        photos_per_second=progress.rate,
        **{f"outcome.{kind}": count for kind, count in outcomes.items()},
    )
