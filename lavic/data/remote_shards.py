"""The shards of a set in an object store, read through the cache of this machine and downloaded ahead of their use."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from pydantic import Field, PositiveInt

from lavic.config import ByteCount, settings
from lavic.data.manifest import Manifest
from lavic.errors import LavicError
from lavic.storage.cache.shard_cache import ShardCache, shard_folder
from lavic.storage.cache.shard_download import RemoteShard, read_range
from lavic.storage.file_lock import FileLock

log = logging.getLogger(__name__)


@settings
class CacheSettings:
    """Copies of shards that are in an object store; sets in folders are read where they are."""

    folder: Path | None = None
    """Where each machine keeps its copies, best on a disk of its own. None: `shards` in LAVIC_CACHE, else in
    `lavic-<uid>` in SLURM_TMPDIR or TMPDIR, else ~/.cache/lavic/shards."""
    bytes: ByteCount = Field(default="50GiB", validate_default=True, gt=0)
    """Most bytes of all copies on a machine (`50GiB`, `2TB`); those used longest ago make room. Less where the disk is
    full. A set that fits is downloaded once."""
    downloads: PositiveInt = 4
    """Most downloads ahead of use at the same time on a machine."""


class RemoteShards:
    """What `ShardDataset` reads of shards that are not on this machine."""

    def __init__(self, manifest: Manifest, chosen: CacheSettings, *, copy: bool = True) -> None:
        """Describes them.

        Args:
            manifest: Of the set.
            chosen: Where the copies are.
            copy: Whether a shard is copied before it is read; else only what is asked for is downloaded.
        """
        self._manifest = manifest
        self._chosen = chosen
        self._copy = copy
        self._cache = ShardCache(chosen.folder or shard_folder(), chosen.bytes)
        self._ahead: ReadAhead | None = None
        self._process = os.getpid()

    def read(self, number: int, start: int, end: int) -> bytes:
        """Bytes of a shard; see `ShardCache.read`."""
        shard = self._shard(number)
        if self._copy or self._cache.holds(shard):
            return self._cache.read(shard, start, end)
        return read_range(shard, start, end)

    def read_ahead(self, numbers: Iterable[int]) -> None:
        """Download shards that are needed next, in this order, in the background; at most half of the cache.

        They take the place of those of the call before that are not downloaded yet. What fails is left to the reader.
        """
        wanted: list[RemoteShard] = []
        room = self._cache.limit // 2
        for number in numbers:
            shard = self._shard(number)
            room -= shard.bytes
            if room < 0:
                break
            wanted.append(shard)
        if self._ahead is None or self._process != os.getpid():  # a thread does not come along into a forked worker
            self._ahead, self._process = ReadAhead(self._cache, self._chosen.downloads), os.getpid()
        self._ahead.want(wanted)

    def _shard(self, number: int) -> RemoteShard:
        entry = self._manifest.shards[number]
        return RemoteShard(folder=self._manifest.folder, name=entry.name, sha256=entry.sha256, bytes=entry.bytes)


class ReadAhead:
    """A thread that downloads shards before they are needed.

    Each process that reads has one. They want the same shards, so each takes one that no other is at, and no more than
    `downloads` of them are busy on a machine.
    """

    def __init__(self, cache: ShardCache, downloads: int) -> None:
        """Describe it; the thread starts when something is wanted.

        Args:
            cache: Where to put them.
            downloads: Most at the same time, over all processes that share the cache.
        """
        self._cache = cache
        self._slots = [cache.folder / f".ahead-{number}.lock" for number in range(downloads)]
        self._wanted: list[RemoteShard] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def want(self, shards: Sequence[RemoteShard]) -> None:
        """Download these next, the first one first, and nothing else."""
        with self._changed:
            self._wanted = list(shards)
            self._changed.notify()
        if self._thread is None and shards:
            self._thread = threading.Thread(target=self._run, name="shards ahead", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._wanted:
                    self._changed.wait()
                shards = list(self._wanted)
            left = []
            for shard in shards:
                try:
                    if not self._download(shard):
                        left.append(shard)
                except LavicError as error:  # the reader of the shard will report it
                    log.debug("not downloaded ahead: %s", error)
                if self._wanted != shards:
                    break
            with self._changed:
                if self._wanted == shards:
                    self._wanted = left
                    if left:  # others are at them
                        self._changed.wait(1.0)

    def _download(self, shard: RemoteShard) -> bool:
        """Whether a shard is there now."""
        if self._cache.holds(shard):
            return True
        with ExitStack() as stack:
            for path in self._slots:
                slot = stack.enter_context(FileLock(path))
                if _take(slot):
                    return self._cache.fetch(shard, wait=False)
            return False


def _take(slot: FileLock) -> bool:
    try:
        slot.path.parent.mkdir(parents=True, exist_ok=True)
        return slot.acquire()
    except OSError:
        return False
