"""One shard, from its plan to its seal: fetch, check, write in the plan's order. The unit of work, restart and retry.

Files appear in this order, each whole: tar, index, ledger, seal. A shard is done when its seal stands; whatever a
killed worker leaves is no shard and is made again. Photos that an earlier run has stored are taken from its tar.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lavic.data.atomic import write_whole
from lavic.data.manifest import ShardEntry
from lavic.data.shards import Sample, ShardWriter, beside, index_path, read_samples
from lavic.errors import DataError
from lavic.shards.fetch import Answer, Fetcher, FetchSettings
from lavic.shards.outcomes import Outcome, ledger_path, read_ledger, write_ledger
from lavic.shards.photo import PhotoError, PhotoSettings, to_jpeg
from lavic.shards.plan import PhotoTask, read_tasks

_AHEAD = 4
"""Photos held while an earlier one is awaited, as a multiple of the requests in flight."""


@dataclass(frozen=True, kw_only=True)
class Seal:
    """That a shard is whole, and what it holds."""

    plan: str
    """Digest of the plan it was made from."""
    entry: ShardEntry
    outcomes: Mapping[str, int]
    """Planned photos by outcome."""
    began: float
    """Seconds since the epoch."""
    ended: float

    @property
    def photos(self) -> int:
        """Planned photos."""
        return sum(self.outcomes.values())


@dataclass(frozen=True)
class _Done:
    outcome: Outcome
    sample: Sample | None


def seal_path(shard: Path) -> Path:
    """Where a shard's seal stands: `x-000000.tar` -> `x-000000.seal.json`."""
    return beside(shard, "seal.json")


def read_seal(shard: Path, plan: str) -> Seal | None:
    """The seal of a shard that is whole and of this plan, or None."""
    try:
        body = json.loads(seal_path(shard).read_text("utf-8"))
        seal = Seal(**{**body, "entry": ShardEntry(**body["entry"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    with suppress(OSError):
        size = shard.stat().st_size if seal.entry.samples else 0
        if seal.plan == plan and size == seal.entry.bytes and ledger_path(shard).exists():
            return seal
    return None


def pack_shard(shard: Path, plan: str, fetch: FetchSettings, photo: PhotoSettings, retry: Collection[str] = ()) -> Seal:
    """Make one shard whole.

    Args:
        shard: Where its tar is to stand; its tasks stand in the plan beside it.
        plan: Digest of that plan.
        fetch: How to fetch.
        photo: Which photos to take.
        retry: Kinds of failure to try again; other failures that the ledger knows are kept.

    Raises:
        OSError: The folder cannot be written to.
    """
    began = time.time()
    tasks = read_tasks(shard)
    kept = _kept(shard, tasks, retry)
    # From here on the shard is not whole, whatever happens.
    seal_path(shard).unlink(missing_ok=True)
    ledger: list[Outcome] = []
    with ShardWriter(shard) as writer:
        asyncio.run(_write(tasks, kept, fetch, photo, writer, ledger))
    if not writer.samples:
        shard.unlink(missing_ok=True)
        index_path(shard).unlink(missing_ok=True)
    write_ledger(shard, ledger)
    entry = ShardEntry(
        name=shard.name,
        samples=writer.samples,
        bytes=writer.bytes,
        sha256=writer.sha256,
    )
    outcomes: dict[str, int] = dict(sorted(Counter(row.kind for row in ledger).items()))
    seal = Seal(plan=plan, entry=entry, outcomes=outcomes, began=began, ended=time.time())
    write_whole(seal_path(shard), json.dumps(asdict(seal)) + "\n")
    return seal


def _kept(shard: Path, tasks: Sequence[PhotoTask], retry: Collection[str]) -> dict[str, _Done]:
    """What an earlier run of the same shard has settled, by key."""
    try:
        rows = {row.key: row for row in read_ledger(shard)}
        stored = {sample.key: sample for sample in read_samples(shard)} if shard.exists() else {}
    except DataError:
        # Damaged since: everything is fetched again.
        return {}
    kept = {}
    for task in tasks:
        row, sample = rows.get(task.key), stored.get(task.key)
        if (
            sample
            and sample.meta["url"] == task.url
            and hashlib.sha256(sample.jpg).hexdigest() == sample.meta["sha256"]
        ):
            if row is None or row.kind != "ok":
                row = _outcome(task, kind="ok", bytes=len(sample.jpg), sha256=sample.meta["source_sha256"])
            kept[task.key] = _Done(row, sample)
        elif row and row.kind != "ok" and row.kind not in retry:
            kept[task.key] = _Done(row, None)
    return kept


async def _write(
    tasks: Sequence[PhotoTask],
    kept: Mapping[str, _Done],
    fetch: FetchSettings,
    photo: PhotoSettings,
    writer: ShardWriter,
    ledger: list[Outcome],
) -> None:
    with ThreadPoolExecutor(1, "photo") as decoder:
        async with Fetcher(fetch) as fetcher:
            gate = asyncio.Semaphore(fetch.concurrency)

            async def one(task: PhotoTask) -> _Done:
                if task.key in kept:
                    return kept[task.key]
                async with gate:
                    began = time.perf_counter()
                    answer = await fetcher.fetch(task.url)
                    done = await asyncio.get_running_loop().run_in_executor(decoder, _settle, task, answer, photo)
                seconds = round(time.perf_counter() - began, 3)
                return _Done(replace(done.outcome, seconds=seconds), done.sample)

            async for done in _in_order(one, tasks, _AHEAD * fetch.concurrency):
                ledger.append(done.outcome)
                if done.sample:
                    writer.add(done.sample)


async def _in_order(
    one: Callable[[PhotoTask], Coroutine[Any, Any, _Done]], tasks: Sequence[PhotoTask], ahead: int
) -> AsyncIterator[_Done]:
    """Results in the order of the tasks, with at most `ahead` of them begun and not yet taken."""
    running: deque[asyncio.Task[_Done]] = deque()
    try:
        for task in tasks:
            if len(running) >= ahead:
                yield await running.popleft()
            running.append(asyncio.create_task(one(task)))
        while running:
            yield await running.popleft()
    finally:
        for left in running:
            left.cancel()


def _settle(task: PhotoTask, answer: Answer, photo: PhotoSettings) -> _Done:
    """Check what was fetched and make the sample and the ledger's row of it."""
    row = _outcome(task, kind=answer.kind, reason=answer.reason, http=answer.http, attempts=answer.attempts)
    if answer.kind != "ok":
        return _Done(row, None)
    digest = hashlib.sha256(answer.body).hexdigest()
    row = replace(row, bytes=len(answer.body), sha256=digest)
    try:
        stored = to_jpeg(answer.body, photo)
    except PhotoError as error:
        return _Done(replace(row, kind=error.kind, reason=error.reason), None)
    sample = Sample.of(
        item_id=task.item_id,
        n=task.n,
        jpg=stored.jpg,
        title=task.title,
        width=stored.width,
        height=stored.height,
        text=task.text,
        url=task.url,
        categories=task.categories,
        details=task.details,
        source_sha256=digest,
    )
    return _Done(row, sample)


def _outcome(task: PhotoTask, **values: object) -> Outcome:
    return Outcome(key=task.key, item_id=task.item_id, n=task.n, url=task.url, **values)  # type: ignore[arg-type]
