"""Makes one shard from its plan: fetch, check, write in the order of the plan. The unit of work, restart and retry.

Files appear in this order, each complete: tar, index, ledger, seal. A shard is complete when it has a seal; what a
killed worker leaves is rebuilt. Photos that an earlier run has stored are taken from its tar.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from lavic.data.duplicates import write_references
from lavic.data.tar_writer import ShardWriter
from lavic.errors import DataError
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.http.fetcher import Fetcher
from lavic.shards.image.normalize import PhotoSettings
from lavic.shards.pack.existing_shard import ExistingShard
from lavic.shards.pack.fetch_order import run_by_host
from lavic.shards.pack.host_failures import failures_of, host_of
from lavic.shards.pack.outcomes import ALWAYS_RETRIED, Outcome, read_ledger, write_ledger
from lavic.shards.pack.photo_result import (
    NeedsThread,
    PhotoResult,
    check_response,
    copy_for,
    deferred,
    known_placeholder,
    outcome_of,
)
from lavic.shards.pack.refresh import CHANGED, conditional_headers, refreshed, with_validators_of
from lavic.shards.pack.reorder_buffer import ReorderBuffer
from lavic.shards.pack.seal import Seal, seal_path, write_seal
from lavic.shards.plan.crawl_plan import read_tasks
from lavic.shards.plan.photo_tasks import PhotoTask
from lavic.shards.ratelimit.client import CoordinatorHandle

_REPORT_S = 1.0

Report = Callable[[Mapping[str, int]], None]
"""Called periodically with the number of the shard's photos by outcome so far."""


def pack_shard(
    shard: Path,
    plan: str,
    fetch: FetchSettings,
    photo: PhotoSettings,
    retry: Collection[str] = (),
    *,
    plan_settings: str = "",
    refresh: str = "",
    coordinator: CoordinatorHandle | None = None,
    report: Report | None = None,
    before_publish: Callable[[], None] | None = None,
    defer_after: float = math.inf,
) -> Seal:
    """Make one shard complete.

    Args:
        shard: The path of its tar; the plan beside it has its tasks.
        plan: Digest of its plan.
        fetch: How to fetch.
        photo: Which photos to accept.
        retry: Kinds of failure to retry; other failures in the ledger are kept.
        plan_settings: `Plan.digested_settings`, by which the file of tasks is compared with the digest.
        refresh: Name of the refresh, if stored photos are to be requested again.
        coordinator: Of the crawl's rate limits; by default the limits hold for this shard alone.
        report: Called periodically with the progress.
        before_publish: Called before any file is put in place; it may raise to prevent that.
        defer_after: Seconds after which a shard that waits only for slow hosts is completed without their photos, whose
            outcome is then `unasked`.

    Raises:
        OSError: The folder cannot be written to.
        DataError: The file of tasks is not the one that was planned; the shard stays as it is.
    """
    began = time.time()
    tasks = read_tasks(shard, plan, plan_settings)
    # From here on the shard is incomplete until it is sealed again.
    seal_path(shard).unlink(missing_ok=True)
    ledger = _Ledger(report)
    with ExistingShard(shard) as stored, ShardWriter(shard) as writer:
        earlier = _EarlierRun(_read_rows(shard), stored, retry, refresh=bool(refresh))
        num_deferred = asyncio.run(
            _fetch_photos(tasks, earlier, Fetcher(fetch, coordinator), photo, writer, ledger, defer_after)
        )
        if before_publish:
            before_publish()
    ledger_sha256 = write_ledger(shard, ledger.rows)
    write_references(shard, ())
    seal = Seal(
        plan=plan,
        entry=writer.entry,
        outcomes=dict(sorted(ledger.counts.items())),
        began=began,
        ended=time.time(),
        failures=failures_of(ledger.rows),
        # With deferred photos, the refresh is not done.
        refresh="" if num_deferred else refresh,
        refreshed=dict(sorted(earlier.refreshed.items())),
        left=num_deferred,
        ledger_sha256=ledger_sha256,
    )
    return write_seal(shard, seal)


def _read_rows(shard: Path) -> dict[str, Outcome]:
    try:
        return {row.key: row for row in read_ledger(shard)}
    except DataError:
        # The ledger is damaged: its failures are retried.
        return {}


class _Ledger:
    """The rows of the ledger, and their number by kind, which is reported from time to time."""

    def __init__(self, report: Report | None) -> None:
        self.rows: list[Outcome] = []
        self.counts: Counter[str] = Counter()
        self._report, self._reported = report, time.monotonic()

    def add(self, row: Outcome) -> None:
        self.rows.append(row)
        self.counts[row.kind] += 1
        if self._report and time.monotonic() - self._reported > _REPORT_S:
            self._reported = time.monotonic()
            self._report(self.counts)


class _EarlierRun:
    """The results of an earlier run of the same shard."""

    def __init__(
        self, rows: Mapping[str, Outcome], stored: ExistingShard, retry: Collection[str], *, refresh: bool = False
    ) -> None:
        self._rows, self._stored, self._retry = rows, stored, retry
        self._empty = not rows and stored.empty
        self.refresh = refresh
        """Whether stored photos are requested again."""
        self.refreshed: Counter[str] = Counter()
        """Stored photos by the result of the refresh."""

    def result(self, task: PhotoTask) -> PhotoResult | None:
        """The result of a photo; None if it is to be fetched."""
        if self._empty:
            return None
        row, sample = self._rows.get(task.key), self._stored.sample(task.key)
        if sample and sample.meta["url"] == task.url:
            if row is None or row.kind != "ok":
                row = outcome_of(task, kind="ok", bytes=len(sample.jpg), sha256=sample.meta["source_sha256"])
            return PhotoResult(row, sample)
        return PhotoResult(row) if row and row.kind not in {"ok", *ALWAYS_RETRIED, *self._retry} else None

    def failed(self, group: Sequence[PhotoTask]) -> bool:
        """Whether a picture was requested without success."""
        if self._empty:
            return False
        rows = (self._rows.get(task.key) for task in group)
        return any(row is not None and row.kind not in {"ok", *ALWAYS_RETRIED} for row in rows)


class _GroupFetcher:
    """Gets the results of groups of photos that show one picture, each of which is fetched once.

    Args:
        decoder: Runs checks that take more than a few milliseconds.
    """

    def __init__(self, earlier: _EarlierRun, fetcher: Fetcher, photo: PhotoSettings, decoder: Executor) -> None:
        self._earlier, self._fetcher, self._photo, self._decoder = earlier, fetcher, photo, decoder

    async def results(self, group: Sequence[PhotoTask], *, fresh: bool) -> list[PhotoResult]:
        """The result of each photo of a group; `fresh`: no earlier run has failed to fetch it."""
        known = [self._earlier.result(task) for task in group]
        first = next((result for result in known if result and result.sample), None)
        if first is not None and self._earlier.refresh:
            return await self._refresh(group, known, first)
        if first is None and all(known):
            return [result for result in known if result]
        if first is None:
            first = known_placeholder(group[0], self._photo)
        if first is None:
            # Failures of an earlier run in this group were failures of the same picture.
            return await self._fetch_group(group, fresh=fresh)
        return [result or copy_for(task, first) for result, task in zip(known, group, strict=True)]

    async def _refresh(
        self, group: Sequence[PhotoTask], known: Sequence[PhotoResult | None], stored: PhotoResult
    ) -> list[PhotoResult]:
        new = await self._fetch(group[0], conditional_headers(stored.outcome), fresh=True)
        change, row = refreshed(stored.outcome, new.outcome)
        self._earlier.refreshed[change] += sum(1 for result in known if result and result.sample)
        if change == CHANGED:
            return [new, *(copy_for(task, new) for task in group[1:])]
        first = PhotoResult(row, stored.sample)
        # Failures in this group were failures of the same picture.
        return [
            PhotoResult(with_validators_of(result.outcome, row), result.sample)
            if result and result.sample
            else copy_for(task, first)
            for result, task in zip(known, group, strict=True)
        ]

    async def _fetch_group(self, group: Sequence[PhotoTask], *, fresh: bool) -> list[PhotoResult]:
        first = await self._fetch(group[0], fresh=fresh)
        if len(group) == 1:
            return [first]
        results = {group[0].key: first}
        if first.sample is None:
            # Old catalogues name hosts that are gone, and another one may serve the picture.
            for task in _of_other_hosts(group):
                results[task.key] = result = await self._fetch(task, fresh=fresh)
                if result.sample:
                    results, first = {task.key: result}, result
                    break
        return [results.get(task.key) or copy_for(task, first) for task in group]

    async def _fetch(self, task: PhotoTask, conditions: Mapping[str, str] | None = None, *, fresh: bool) -> PhotoResult:
        start = time.perf_counter()
        response = await self._fetcher.fetch(task.url, conditions, fresh=fresh)
        if response.kind == "ok" and response.http == 304:
            return PhotoResult(outcome_of(task, kind="ok", http=304))
        try:
            return check_response(task, response, self._photo, start, inline=True)
        except NeedsThread:
            loop = asyncio.get_running_loop()
            with self._fetcher.hold():
                return await loop.run_in_executor(self._decoder, check_response, task, response, self._photo, start)


def _of_other_hosts(group: Sequence[PhotoTask]) -> list[PhotoTask]:
    """The first photo of each host, without that of the first one."""
    first_of_host = {host_of(task.url): task for task in reversed(group)}
    return [task for task in group[1:] if first_of_host[host_of(task.url)] is task]


async def _fetch_photos(
    tasks: Sequence[PhotoTask],
    earlier: _EarlierRun,
    fetcher: Fetcher,
    photo: PhotoSettings,
    writer: ShardWriter,
    ledger: _Ledger,
    defer_after: float,
) -> int:
    """Fetch and write all photos; returns how many were deferred."""
    # Neighbours show one picture.
    groups = [list(group) for _, group in groupby(tasks, lambda task: task.same_as or task.key)]
    # Earlier failures come last: if their host still fails, other photos have shown by then whether it is up.
    failed = {number for number, group in enumerate(groups) if earlier.failed(group)}
    order = sorted(range(len(groups)), key=failed.__contains__)
    stop = _SlowHosts(fetcher, defer_after) if defer_after < math.inf else None

    def write(results: list[PhotoResult]) -> None:
        for result in results:
            ledger.add(result.outcome)
            if result.sample:
                writer.add(result.sample)

    def first_host(number: int) -> str:
        return groups[number][0].url.partition("://")[2].partition("/")[0]

    with ThreadPoolExecutor(1, "photo") as decoder, ReorderBuffer(write) as buffer:
        group_fetcher = _GroupFetcher(earlier, fetcher, photo, decoder)

        async def process(number: int) -> None:
            results = await group_fetcher.results(groups[number], fresh=number not in failed)
            buffer.add(number, results, sum(len(result.sample.jpg) for result in results if result.sample))

        async with fetcher:
            deferred_groups = await run_by_host(order, process, first_host, stop)
        for number in deferred_groups:
            buffer.add(number, [earlier.result(task) or deferred(task) for task in groups[number]], 0)
        return sum(len(groups[number]) for number in deferred_groups)


class _SlowHosts:
    """Whether a shard has been waiting only for slow hosts for `seconds`."""

    def __init__(self, fetcher: Fetcher, seconds: float) -> None:
        self._fetcher, self._seconds = fetcher, seconds
        self._since = math.inf

    def __call__(self) -> bool:
        now = time.monotonic()
        self._since = min(self._since, now) if self._fetcher.only_slow_hosts else math.inf
        return now - self._since >= self._seconds
