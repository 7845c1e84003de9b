"""Makes shards as a Ray Data job, a few of them per task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lavic.distributed.ray_session import actor_beside_driver, ray_session
from lavic.shards.cluster.progress import ShardReports
from lavic.shards.cluster.worker import Row, ShardJob, deferred_row, make_shard
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.ratelimit.coordinator import RayCoordinator

_MAX_PORTION = 16
"""Shards of a task, at most: when a worker dies, those that it has made are rebuilt from what they hold."""


@contextmanager
def on_ray(rows: Sequence[Row], settings: CrawlSettings, owner: str) -> Iterator[ShardJob]:
    """Make shards on a Ray cluster that is joined or started for it; see `make_shard`.

    Raises:
        LaunchError: Ray cannot be reached or started.
    """
    with ray_session(settings.ray):
        import pyarrow as pa
        import ray
        import ray.data

        reports = actor_beside_driver(ShardReports)
        workers = settings.ray.workers or int(ray.cluster_resources().get("CPU", 1))
        coordinator: Any = RayCoordinator(settings.fetch.limits)

        def make(rows: Sequence[Row]) -> Iterator[Row]:
            job = ray.data.from_arrow([pa.Table.from_pylist(portion) for portion in _portions(rows, workers)]).map(
                _make_shard,
                fn_args=(settings, owner, coordinator, reports),
                num_cpus=1,
                concurrency=settings.ray.workers,
            )
            yield from job.iter_rows()

        yield ShardJob(
            made=_rounds(rows, workers, make),
            running=lambda: _get(reports.get.remote()),
            wait_reasons=lambda: _get(coordinator.wait_reasons()),
        )


def _rounds(rows: Sequence[Row], workers: int, make: Callable[[Sequence[Row]], Iterator[Row]]) -> Iterator[Row]:
    """Deferred shards, which only wait for slow hosts, are made after all others."""
    while rows:
        if len(rows) <= workers:
            # Each has a worker, which nobody else needs.
            rows = [{**row, "defer_after": math.inf} for row in rows]
        deferred = set()
        for result in make(rows):
            if result["left"]:
                deferred.add(result["number"])
            else:
                yield result
        rows = [deferred_row(row) for row in rows if row["number"] in deferred]


def _portions(rows: Sequence[Row], workers: int) -> Iterator[Sequence[Row]]:
    """The rows of each task, fewer and fewer: Ray takes tenths of a second between two tasks.

    The last portions are single shards, so that no worker has several left when the others are done.
    """
    start = 0
    while start < len(rows):
        size = max(1, min(_MAX_PORTION, (len(rows) - start) // (4 * workers)))
        yield rows[start : start + size]
        start += size


def _get(reference: Any) -> Any:
    """The result of an actor; empty while the actor restarts."""
    import ray

    try:
        return ray.get(reference, timeout=2.0)
    except ray.exceptions.RayError:
        return {}


def _make_shard(row: Row, settings: CrawlSettings, owner: str, coordinator: Any, reports: Any) -> Row:
    """Runs in a Ray worker."""

    def report(counts: Any) -> None:
        reports.put.remote(row["number"], dict(counts))

    return make_shard(row, settings, owner, coordinator, report)
