"""Reads the shards of a set in an object store through the local cache, with prefetching."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
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
    """The local cache of shards in an object store; local sets are read without it."""

    folder: Path | None = None
    """Folder of each machine's copies, best on a local disk. None: `shards` in LAVIC_CACHE, else in `lavic-<uid>` in
    SLURM_TMPDIR or TMPDIR, else ~/.cache/lavic/shards."""
    bytes: ByteCount = Field(default="50GiB", validate_default=True, gt=0)
    """Maximum size of all copies on a machine (`50GiB`, `2TB`), less if the disk is full; the least recently used are
    removed. A set that fits is downloaded once."""
    downloads: PositiveInt = 4
    """Maximum number of parallel prefetches on a machine."""


class RemoteShards:
    """Reads bytes of the shards of a set in an object store."""

    def __init__(self, manifest: Manifest, settings: CacheSettings, *, copy: bool = True) -> None:
        """Opens no connection yet. Without `copy` only the requested bytes of a shard are downloaded."""
        self._manifest = manifest
        self._settings = settings
        self._copy = copy
        self._cache = ShardCache(settings.folder or shard_folder(), settings.bytes)
        self._ahead: ReadAhead | None = None
        self._process = os.getpid()

    def read(self, number: int, start: int, end: int) -> bytes:
        """Bytes of a shard; see `ShardCache.read`."""
        shard = self._shard(number)
        if self._copy or self._cache.holds(shard):
            return self._cache.read(shard, start, end)
        return read_range(shard, start, end)

    def read_ahead(self, numbers: Iterable[int]) -> None:
        """Prefetches shards in the background, in this order, up to half of the cache.

        They replace those of the previous call that are not downloaded yet. The reader reports a failure.
        """
        shards: list[RemoteShard] = []
        bytes_left = self._cache.limit // 2
        for number in numbers:
            shard = self._shard(number)
            bytes_left -= shard.bytes
            if bytes_left < 0:
                break
            shards.append(shard)
        if self._ahead is None or self._process != os.getpid():  # a forked worker does not inherit the thread
            self._ahead, self._process = ReadAhead(self._cache, self._settings.downloads), os.getpid()
        self._ahead.request(shards)

    def _shard(self, number: int) -> RemoteShard:
        entry = self._manifest.shards[number]
        return RemoteShard(folder=self._manifest.folder, name=entry.name, sha256=entry.sha256, bytes=entry.bytes)


class ReadAhead:
    """A thread that downloads shards before they are read.

    Each reading process has one. Processes of a node read the same shards, so each downloads one that no other is
    downloading, and at most `downloads` run at a time on a machine.
    """

    def __init__(self, cache: ShardCache, downloads: int) -> None:
        """The thread starts with the first request. `downloads` counts over all processes that share the cache."""
        self._cache = cache
        self._slots = [cache.folder / f".ahead-{number}.lock" for number in range(downloads)]
        self._requested: list[RemoteShard] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def request(self, shards: Sequence[RemoteShard]) -> None:
        """Downloads these shards, in order, instead of those of earlier requests."""
        with self._changed:
            self._requested = list(shards)
            self._changed.notify()
        if self._thread is None and shards:
            self._thread = threading.Thread(target=self._run, name="shards ahead", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._requested:
                    self._changed.wait()
                shards = list(self._requested)
            remaining = []
            for shard in shards:
                try:
                    if not self._download(shard):
                        remaining.append(shard)
                except LavicError as error:  # the reader of the shard will report it
                    log.debug("prefetch failed: %s", error)
                if self._requested != shards:
                    break
            with self._changed:
                if self._requested == shards:
                    self._requested = remaining
                    if remaining:  # other processes are downloading them
                        self._changed.wait(1.0)

    def _download(self, shard: RemoteShard) -> bool:
        """Downloads a shard; returns whether the cache has it now."""
        if self._cache.holds(shard):
            return True
        with suppress(OSError):  # of the folder
            self._cache.folder.mkdir(parents=True, exist_ok=True)
            for path in self._slots:
                with FileLock(path) as slot:
                    if slot.acquire():
                        return self._cache.fetch(shard, wait=False)
        return False
