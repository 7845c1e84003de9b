"""One shard, from its plan to its seal: fetch, check, write in the plan's order. The unit of work, restart and retry.

Files appear in this order, each whole: tar, index, ledger, seal. A shard is done when its seal stands; whatever a
killed worker leaves is no shard and is made again. Photos that an earlier run has stored are taken from its tar.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from lavic.data.atomic import write_whole
from lavic.data.checked import dump_checked, load_checked
from lavic.data.ledger import ledger_path
from lavic.data.manifest import EMPTY_TAR, ShardEntry
from lavic.data.place import storage_errors
from lavic.data.references import write_references
from lavic.data.shards import Sample, ShardWriter, beside, index_path
from lavic.errors import DataError
from lavic.shards.byhost import Failures, failures_of
from lavic.shards.decoder import shared
from lavic.shards.exchange import Answer
from lavic.shards.fetch import Fetcher, FetchSettings
from lavic.shards.lane import Office
from lavic.shards.outcomes import ASKED_AGAIN, Outcome, read_ledger, write_ledger
from lavic.shards.photo import PhotoError, PhotoSettings, examine, store
from lavic.shards.placeholders import placeholder_id
from lavic.shards.plan import read_tasks
from lavic.shards.refresh import CHANGED, conditions_of, refreshed
from lavic.shards.reorder import ReorderBuffer
from lavic.shards.schedule import Schedule
from lavic.shards.stored import Stored
from lavic.shards.tasks import PhotoTask

_AT_ONCE = 256 * 1024
"""A JPEG of at most so many bytes, and of little effort, is checked between two answers, others in a thread beside:
handing one over and back costs about a third of a check to its last bit, and many times one of the header."""
_REPORT_S = 1.0

Report = Callable[[Mapping[str, int]], None]
"""Told now and then how many photos of the shard have come to which end so far."""


@dataclass(frozen=True, kw_only=True)
class Seal:
    """That a shard is whole, and what it holds."""

    plan: str
    """Digest of what was planned for it."""
    entry: ShardEntry
    outcomes: Mapping[str, int]
    """Planned photos by outcome."""
    began: float
    """Seconds since the epoch."""
    ended: float
    failures: Failures = field(default_factory=dict)
    """Photos that failed, by kind and host."""
    refresh: str = ""
    """Name of the refresh that it has gone through, see `lavic.shards.refresh`."""
    refreshed: Mapping[str, int] = field(default_factory=dict)
    """What that made of its stored photos."""
    left: int = 0
    """Photos that were left for later since their hosts are slow; they are among those `unasked`."""
    references: str = ""
    """Digest of the photos that refer to others, see `lavic.shards.refer`; empty where every photo is stored."""
    ledger_sha256: str = ""
    """Of the ledger's file."""
    references_sha256: str = ""
    """Of the references' file; empty where there is none."""

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


def read_seal(shard: Path, plan: str, found: Mapping[str, int]) -> Seal | None:
    """The seal of a shard that is whole and of this plan, or None.

    Args:
        shard: Where its tar stands.
        plan: Digest of what is planned for it.
        found: Bytes of the files in its folder, by name.
    """
    if not {seal_path(shard).name, ledger_path(shard).name} <= found.keys():
        return None
    try:
        seal = unpack_seal(seal_path(shard).read_bytes())
    except storage_errors(ValueError, TypeError, KeyError):
        return None
    tar, index = found.get(shard.name, 0), found.get(index_path(shard).name, 0)
    if seal.entry.samples:
        whole = tar == seal.entry.bytes and index == 8 * (seal.entry.samples + 1)
    else:
        whole = tar in (0, len(EMPTY_TAR)) and index == 0
    return seal if seal.plan == plan and whole else None


def pack_seal(seal: Seal) -> str:
    """A seal as text."""
    return dump_checked(asdict(seal))


def unpack_seal(data: bytes) -> Seal:
    """The seal that `pack_seal` made a text of. Raises ValueError, TypeError or KeyError for anything else."""
    body = load_checked(data)
    return Seal(**{**body, "entry": ShardEntry(**body["entry"])})


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

    def find(self, task: PhotoTask) -> _Done | None:
        """How a photo ended; None where it is to be fetched."""
        if self._nothing:
            return None
        row, sample = self._rows.get(task.key), self._stored.sample(task.key)
        if sample and sample.meta["url"] == task.url:
            if row is None or row.kind != "ok":
                row = _outcome(task, kind="ok", bytes=len(sample.jpg), sha256=sample.meta["source_sha256"])
            return _Done(row, sample)
        return _Done(row, None) if row and row.kind not in {"ok", *ASKED_AGAIN, *self._retry} else None

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

    def write(results: list[_Done]) -> None:
        for done in results:
            ledger.add(done.outcome)
            if done.sample:
                writer.add(done.sample)

    with ThreadPoolExecutor(1, "photo") as decoder, ReorderBuffer(write) as buffer:

        async def fetched(task: PhotoTask, conditions: Mapping[str, str] | None = None, *, fresh: bool) -> _Done:
            began = time.perf_counter()
            answer = await fetcher.fetch(task.url, conditions, fresh=fresh)
            if answer.kind == "ok" and answer.http == 304:
                return _Done(_outcome(task, kind="ok", http=304), None)
            try:
                return _settle(task, answer, photo, began, at_once=True)
            except _TakesLonger:
                loop = asyncio.get_running_loop()
                with fetcher.held():
                    return await loop.run_in_executor(decoder, _settle, task, answer, photo, began)

        async def renewed(group: list[PhotoTask], settled: Sequence[_Done | None], stored: _Done) -> list[_Done]:
            new = await fetched(group[0], conditions_of(stored.outcome), fresh=True)
            what, row = refreshed(stored.outcome, new.outcome)
            known.refreshed[what] += sum(1 for done in settled if done and done.sample)
            if what == CHANGED:
                return [new, *(_same(new, task) for task in group[1:])]
            first = _Done(row, stored.sample)
            # What failed in this group was the same picture.
            return [
                _Done(_remarked(done.outcome, row), done.sample) if done and done.sample else _same(first, task)
                for done, task in zip(settled, group, strict=True)
            ]

        async def settle(group: list[PhotoTask], fresh: bool) -> list[_Done]:
            settled = [known.find(task) for task in group]
            first = next((done for done in settled if done and done.sample), None)
            if first is not None and known.refresh:
                return await renewed(group, settled, first)
            if first is None and all(settled):
                return [done for done in settled if done]
            if first is None:
                first = _known_placeholder(group[0], photo)
            if first is None:
                first = await fetched(group[0], fresh=fresh)
                if len(group) == 1:
                    return [first]
                # An earlier run's failures in this group were failures of the same picture.
                settled = [first, *(None for _ in group[1:])]
            return [done or _same(first, task) for done, task in zip(settled, group, strict=True)]

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
            buffer.add(number, [known.find(task) or _left(task) for task in pictures[number]], 0)
        return sum(len(pictures[number]) for number in left)


def _left(task: PhotoTask) -> _Done:
    return _Done(_outcome(task, kind="unasked", reason="its host is slow: left for later"), None)


class _Patience:
    """Says when a shard that only waits for slow hosts has been waited for long enough."""

    def __init__(self, fetcher: Fetcher, seconds: float) -> None:
        self._fetcher, self._seconds = fetcher, seconds
        self._since = math.inf

    def __call__(self) -> bool:
        now = time.monotonic()
        self._since = min(self._since, now) if self._fetcher.waiting else math.inf
        return now - self._since >= self._seconds


def _known_placeholder(task: PhotoTask, photo: PhotoSettings) -> _Done | None:
    """The end of a photo whose link says that it stands for a missing one; None for others."""
    if not (id := placeholder_id(task.url, photo.placeholders)):
        return None
    return _Done(_outcome(task, kind="placeholder", reason=f"Amazon's image {id} stands for a missing photo"), None)


class _TakesLonger(Exception):
    """A photo that is not checked within milliseconds."""


def _settle(task: PhotoTask, answer: Answer, photo: PhotoSettings, began: float, *, at_once: bool = False) -> _Done:
    """Check what was fetched and make the sample and the ledger's row of it; `at_once`, or raise _TakesLonger."""
    if at_once and len(answer.body) > _AT_ONCE:
        raise _TakesLonger
    kind, reason, digest, sample = answer.kind, answer.reason, "", None
    if kind == "ok":
        digest = hashlib.sha256(answer.body).hexdigest()
        try:
            found = examine(answer.body, photo, digest)
            if at_once and found.effort != "little":
                raise _TakesLonger
            stored = shared().store(found, photo) if found.effort == "unknown" else store(found, photo)
            kept = digest if stored.jpg is answer.body else ""
            sample = _sample(task, stored.jpg, stored.width, stored.height, kept, digest)
        except PhotoError as error:
            kind, reason = error.kind, error.reason
    row = _outcome(
        task,
        kind=kind,
        reason=reason,
        http=answer.http,
        attempts=answer.attempts,
        bytes=len(answer.body),
        sha256=digest,
        seconds=round(time.perf_counter() - began, 3),
        etag=answer.etag if sample else "",
        last_modified=answer.last_modified if sample else "",
    )
    return _Done(row, sample)


def _remarked(row: Outcome, other: Outcome) -> Outcome:
    """A stored photo's row with what the refresh of another, which shows the same picture, says of it."""
    return replace(row, etag=other.etag, last_modified=other.last_modified, refresh_failed=other.refresh_failed)


def _same(first: _Done, task: PhotoTask) -> _Done:
    """The end of a photo that shows the picture of another, which was fetched."""
    row = first.outcome
    same = replace(row, **_names(task), attempts=0, seconds=0.0)
    if first.sample is None:
        return _Done(same, None)
    meta = first.sample.meta
    sample = _sample(task, first.sample.jpg, meta["width"], meta["height"], meta["sha256"], meta["source_sha256"])
    return _Done(same, sample)


def _sample(task: PhotoTask, jpg: bytes, width: int, height: int, sha256: str, source_sha256: str) -> Sample:
    return Sample.of(
        item_id=task.item_id,
        n=task.n,
        jpg=jpg,
        title=task.title,
        width=width,
        height=height,
        text=task.text,
        url=task.url,
        categories=task.categories,
        details=task.details,
        source_sha256=source_sha256,
        sha256=sha256,
    )


def _outcome(task: PhotoTask, **values: Any) -> Outcome:
    return Outcome(**_names(task), **values)


def _names(task: PhotoTask) -> dict[str, Any]:
    """What a row of the ledger has from the plan alone, so that it does not depend on which run wrote it."""
    return {"key": task.key, "item_id": task.item_id, "n": task.n, "url": task.url, "same_as": task.same_as}
