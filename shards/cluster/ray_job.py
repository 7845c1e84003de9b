"""Shards as a Ray Data job, a few of them a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lavic.distributed.ray_session import ray_session
from lavic.shards.cluster.progress import ShardReports
from lavic.shards.cluster.worker import Job, Row, later, make_shard
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.ratelimit.coordinator import RayBroker

_PORTION = 16
"""Shards of a task, at most: when a worker dies, those it had made of them are made again, from what they hold."""


@contextmanager
def on_ray(rows: Sequence[Row], settings: CrawlSettings, owner: str) -> Iterator[Job]:
    """Have shards made by a Ray that is joined or started for it; see `make_shard`.

    Raises:
        LaunchError: Ray cannot be reached or started.
    """
    with ray_session(settings.ray):
        import pyarrow as pa
        import ray
        import ray.data

        reports = _reports(ray)
        workers = settings.ray.workers or int(ray.cluster_resources().get("CPU", 1))
        broker = RayBroker(settings.fetch.limits)

        def make(rows: Sequence[Row]) -> Iterator[Row]:
            job = ray.data.from_arrow([pa.Table.from_pylist(portion) for portion in _portions(rows, workers)]).map(
                _make_one,
                fn_args=(settings, owner, broker, reports),
                num_cpus=1,
                concurrency=settings.ray.workers,
            )
            yield from job.iter_rows()

        yield Job(
            made=_rounds(rows, workers, make),
            running=lambda: _get(ray, reports.get.remote()),
            waits=lambda: _get(ray, broker.waits()),
        )


def _rounds(rows: Sequence[Row], workers: int, make: Callable[[Sequence[Row]], Iterator[Row]]) -> Iterator[Row]:
    """Shards that workers leave, since they only wait for slow hosts, are made when all others are."""
    while rows:
        if len(rows) <= workers:
            # Each has a worker of its own, and nobody else needs it.
            rows = [{**row, "leave_after": math.inf} for row in rows]
        left = set()
        for made in make(rows):
            if made["left"]:
                left.add(made["number"])
            else:
                yield made
        rows = [later(row) for row in rows if row["number"] in left]


def _portions(rows: Sequence[Row], workers: int) -> Iterator[Sequence[Row]]:
    """What a task makes one after the other, fewer and fewer: Ray takes tenths of a second from a task to the next.

    The last portions are single shards, so that no worker is left with several when the others are done.
    """
    at = 0
    while at < len(rows):
        size = max(1, min(_PORTION, (len(rows) - at) // (4 * workers)))
        yield rows[at : at + size]
        at += size


def _reports(ray: Any) -> Any:
    """The actor that workers tell how far they are; beside the driver, so that it is lost with it alone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(ShardReports).remote()


def _get(ray: Any, reference: Any) -> Any:
    """What an actor returns; nothing while it is moved from a lost machine."""
    try:
        return ray.get(reference, timeout=2.0)
    except ray.exceptions.RayError:
        return {}


def _make_one(row: Row, settings: CrawlSettings, owner: str, office: RayBroker, reports: Any) -> Row:
    """Runs in a Ray worker."""

    def report(counts: Any) -> None:
        reports.put.remote(row["number"], dict(counts))

    return make_shard(row, settings, owner, office, report)
