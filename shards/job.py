"""The shards of a plan as one Ray Data job, a few of them a task."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from lavic.data.place import place, storage_errors
from lavic.errors import LavicError, first_line
from lavic.shards.broker import RayBroker
from lavic.shards.cluster import ray_session
from lavic.shards.owner import Superseded, check, unwritable
from lavic.shards.pack import Seal, pack_seal, pack_shard, unpack_seal
from lavic.shards.plan import Plan
from lavic.shards.progress import Progress, Tally
from lavic.shards.settings import CrawlSettings
from lavic.tracking import Tracker

_JOURNAL_S = 2.0
"""Seconds between two lines of the journal."""
_PORTION = 16
"""Shards of a task, at most: when a worker dies, those it had made of them are made again, from what they hold."""

Row = dict[str, Any]


def make_shards(
    plan: Plan,
    todo: Sequence[int],
    settled: Sequence[Mapping[str, int]],
    settings: CrawlSettings,
    owner: str,
    tracker: Tracker,
) -> Iterator[tuple[int, Seal]]:
    """Make shards, as they become whole.

    Args:
        plan: Of the set.
        todo: Numbers of the shards to make.
        settled: For every shard of the plan the photos by outcome that are not asked for again.
        settings: Of the crawl.
        owner: Whose crawl this is: no shard is put in place once the folder is another's.
        tracker: Told how the photos fare.

    Yields:
        A shard's number and its seal.

    Raises:
        LavicError: The folder cannot be written to, or is another crawl's by now.
    """
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
                seal = unpack_seal(row["seal"].encode())
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


def _make_one(row: Row, settings: CrawlSettings, owner: str, office: RayBroker, tally: Any) -> dict[str, object]:
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
