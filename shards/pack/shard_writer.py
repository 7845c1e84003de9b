"""One shard, from its plan to its seal: fetch, check, write in the plan's order. The unit of work, restart and retry.

Files appear in this order, each whole: tar, index, ledger, seal. A shard is done when its seal stands; whatever a
killed worker leaves is no shard and is made again. Photos that an earlier run has stored are taken from its tar.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from lavic.data.duplicates import write_references
from lavic.data.manifest import ShardEntry
from lavic.data.tar_shards import ShardWriter, index_path
from lavic.errors import DataError
from lavic.shards.http.fetcher import Fetcher, FetchSettings
from lavic.shards.image.normalize import PhotoSettings
from lavic.shards.pack.existing_shard import Stored
from lavic.shards.pack.fetch_order import Schedule
from lavic.shards.pack.host_failures import failures_of
from lavic.shards.pack.outcomes import ASKED_AGAIN, Outcome, read_ledger, write_ledger
from lavic.shards.pack.photo_result import (
    PhotoResult,
    TakesLonger,
    check_answer,
    known_placeholder,
    left_for_later,
    outcome_of,
    same_picture,
    with_marks_of,
)
from lavic.shards.pack.refresh import CHANGED, conditions_of, refreshed
from lavic.shards.pack.reorder_buffer import ReorderBuffer
from lavic.shards.pack.seal import Seal, pack_seal, seal_path
from lavic.shards.plan.crawl_plan import read_tasks
from lavic.shards.plan.photo_tasks import PhotoTask
from lavic.shards.ratelimit.client import Office
from lavic.storage.atomic import write_whole

_REPORT_S = 1.0

Report = Callable[[Mapping[str, int]], None]
"""Told now and then how many photos of the shard have come to which end so far."""


def pack_shard(
    shard: Path,
    plan: str,
    fetch: FetchSettings,
    photo: PhotoSettings,
    retry: Collection[str] = (),
    *,
    refresh: str = "",
    office: Office | None = None,
    report: Report | None = None,
    publish: Callable[[], None] | None = None,
    leave_after: float = math.inf,
) -> Seal:
    """Make one shard whole.

    Args:
        shard: Where its tar is to stand; its tasks stand in the plan beside it.
        plan: Digest of what is planned for it.
        fetch: How to fetch.
        photo: Which photos to take.
        retry: Kinds of failure to try again; other failures that the ledger knows are kept.
        refresh: Name of the refresh, if stored photos are to be asked for again.
        office: Where the hosts' budgets of the whole crawl are kept; by default this shard has its own.
        report: Told now and then how far it is.
        publish: Called before anything is put in place; raises where this must not happen any more.
        leave_after: Seconds that are waited when all photos that are missing are those of slow hosts; then the shard is
            made without them, and they are `unasked`.

    Raises:
        OSError: The folder cannot be written to.
    """
    began = time.time()
    tasks = read_tasks(shard)
    # From here on the shard is not whole, whatever happens.
    seal_path(shard).unlink(missing_ok=True)
    ledger: list[Outcome] = []
    left = 0
    with Stored(shard) as stored, ShardWriter(shard) as writer:
        known = _Known(_rows(shard), stored, retry, refresh=bool(refresh))
        left = asyncio.run(
            _write(tasks, known, Fetcher(fetch, office), photo, writer, _Ledger(ledger, report), leave_after)
        )
        if publish:
            publish()
    if not writer.samples:
        shard.unlink(missing_ok=True)
        index_path(shard).unlink(missing_ok=True)
    ledger_sha256 = write_ledger(shard, ledger)
    write_references(shard, ())
    entry = ShardEntry(name=shard.name, samples=writer.samples, bytes=writer.bytes, sha256=writer.sha256)
    outcomes: dict[str, int] = dict(sorted(Counter(row.kind for row in ledger).items()))
    ended = time.time()
    seal = Seal(
        plan=plan,
        entry=entry,
        outcomes=outcomes,
        began=began,
        ended=ended,
        failures=failures_of(ledger),
        # Where photos were left, the refresh is not done.
        refresh="" if left else refresh,
        refreshed=dict(sorted(known.refreshed.items())),
        left=left,
        ledger_sha256=ledger_sha256,
    )
    write_whole(seal_path(shard), pack_seal(seal))
    return seal


def _rows(shard: Path) -> dict[str, Outcome]:
    try:
        return {row.key: row for row in read_ledger(shard)}
    except DataError:
        # Damaged since: failures that it knew are tried again.
        return {}


class _Ledger:
    """Takes the rows in, and reports their number by kind from time to time."""

    def __init__(self, rows: list[Outcome], report: Report | None) -> None:
        self._rows, self._report = rows, report
        self._kinds: Counter[str] = Counter()
        self._said = time.monotonic()

    def add(self, row: Outcome) -> None:
        self._rows.append(row)
        if self._report:
            self._kinds[row.kind] += 1
            if time.monotonic() - self._said > _REPORT_S:
                self._said = time.monotonic()
                self._report(self._kinds)


class _Known:
    """What an earlier run of the same shard has settled."""

    def __init__(
        self, rows: Mapping[str, Outcome], stored: Stored, retry: Collection[str], *, refresh: bool = False
    ) -> None:
        self._rows, self._stored, self._retry = rows, stored, retry
        self._nothing = not rows and stored.empty
        self.refresh = refresh
        """Stored photos are to be asked for again."""
        self.refreshed: Counter[str] = Counter()
        """What came of that."""

    def find(self, task: PhotoTask) -> PhotoResult | None:
        """How a photo ended; None where it is to be fetched."""
        if self._nothing:
            return None
        row, sample = self._rows.get(task.key), self._stored.sample(task.key)
        if sample and sample.meta["url"] == task.url:
            if row is None or row.kind != "ok":
                row = outcome_of(task, kind="ok", bytes=len(sample.jpg), sha256=sample.meta["source_sha256"])
            return PhotoResult(row, sample)
        return PhotoResult(row, None) if row and row.kind not in {"ok", *ASKED_AGAIN, *self._retry} else None

    def failed(self, group: Sequence[PhotoTask]) -> bool:
        """Whether a picture was asked for before, in vain."""
        if self._nothing:
            return False
        rows = (self._rows.get(task.key) for task in group)
        return any(row is not None and row.kind not in {"ok", *ASKED_AGAIN} for row in rows)


async def _write(
    tasks: Sequence[PhotoTask],
    known: _Known,
    fetcher: Fetcher,
    photo: PhotoSettings,
    writer: ShardWriter,
    ledger: _Ledger,
    leave_after: float,
) -> int:
    """Fetch and write all photos; returns how many were left for later."""
    # Neighbours that show one picture: the first is fetched and stands for all.
    pictures = [list(group) for _, group in groupby(tasks, lambda task: task.same_as or task.key)]

    def write(results: list[PhotoResult]) -> None:
        for done in results:
            ledger.add(done.outcome)
            if done.sample:
                writer.add(done.sample)

    with ThreadPoolExecutor(1, "photo") as decoder, ReorderBuffer(write) as buffer:

        async def fetched(task: PhotoTask, conditions: Mapping[str, str] | None = None, *, fresh: bool) -> PhotoResult:
            began = time.perf_counter()
            answer = await fetcher.fetch(task.url, conditions, fresh=fresh)
            if answer.kind == "ok" and answer.http == 304:
                return PhotoResult(outcome_of(task, kind="ok", http=304), None)
            try:
                return check_answer(task, answer, photo, began, at_once=True)
            except TakesLonger:
                loop = asyncio.get_running_loop()
                with fetcher.held():
                    return await loop.run_in_executor(decoder, check_answer, task, answer, photo, began)

        async def renewed(
            group: list[PhotoTask], settled: Sequence[PhotoResult | None], stored: PhotoResult
        ) -> list[PhotoResult]:
            new = await fetched(group[0], conditions_of(stored.outcome), fresh=True)
            what, row = refreshed(stored.outcome, new.outcome)
            known.refreshed[what] += sum(1 for done in settled if done and done.sample)
            if what == CHANGED:
                return [new, *(same_picture(new, task) for task in group[1:])]
            first = PhotoResult(row, stored.sample)
            # What failed in this group was the same picture.
            return [
                PhotoResult(with_marks_of(done.outcome, row), done.sample)
                if done and done.sample
                else same_picture(first, task)
                for done, task in zip(settled, group, strict=True)
            ]

        async def settle(group: list[PhotoTask], fresh: bool) -> list[PhotoResult]:
            settled = [known.find(task) for task in group]
            first = next((done for done in settled if done and done.sample), None)
            if first is not None and known.refresh:
                return await renewed(group, settled, first)
            if first is None and all(settled):
                return [done for done in settled if done]
            if first is None:
                first = known_placeholder(group[0], photo)
            if first is None:
                first = await fetched(group[0], fresh=fresh)
                if len(group) == 1:
                    return [first]
                # An earlier run's failures in this group were failures of the same picture.
                settled = [first, *(None for _ in group[1:])]
            return [done or same_picture(first, task) for done, task in zip(settled, group, strict=True)]

        async def make(number: int) -> None:
            results = await settle(pictures[number], number not in failed)
            buffer.add(number, results, sum(len(done.sample.jpg) for done in results if done.sample))

        # What failed in an earlier run comes last: if its host still fails, there is proof of the contrary by then.
        failed = {number for number, group in enumerate(pictures) if known.failed(group)}
        order = sorted(range(len(pictures)), key=failed.__contains__)
        schedule = Schedule(make, lambda number: pictures[number][0].url.partition("://")[2].partition("/")[0])
        async with fetcher:
            left = await schedule.run(order, _Patience(fetcher, leave_after) if leave_after < math.inf else None)
        for number in left:
            buffer.add(number, [known.find(task) or left_for_later(task) for task in pictures[number]], 0)
        return sum(len(pictures[number]) for number in left)


class _Patience:
    """Says when a shard that only waits for slow hosts has been waited for long enough."""

    def __init__(self, fetcher: Fetcher, seconds: float) -> None:
        self._fetcher, self._seconds = fetcher, seconds
        self._since = math.inf

    def __call__(self) -> bool:
        now = time.monotonic()
        self._since = min(self._since, now) if self._fetcher.waiting else math.inf
        return now - self._since >= self._seconds
