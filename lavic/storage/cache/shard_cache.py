"""A cache of an object store's shards on the local disk, shared by all processes of the machine and bounded by bytes.

A copy is named by the sha256 in the manifest: a repacked shard is another file, and sets with the same shard share it.

FOLDER/<sha256>.tar          a complete, verified copy; its modification time is about that of its last use
       .<sha256>.lock        held by the process that downloads it
       .<sha256>.<id>.part   a download; abandoned if no process holds the lock
       .room.lock            held while old copies are removed

A reader opens a copy for a single read, so no copy is pinned: it may be removed at any time. A read in progress then
finishes (Linux keeps an open file that has no name), and the next reader downloads the shard again.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import time
import uuid
from contextlib import suppress
from pathlib import Path

from lavic.errors import ConfigError, LavicError, first_line
from lavic.storage.cache.shard_download import RemoteShard, copy_shard
from lavic.storage.file_lock import FileLock, is_held

ATTEMPTS = 5
"""Attempts at a download before it fails."""
BACKOFF_S = 0.5
"""Wait before the second attempt; it doubles with each further one."""
_TOUCH_S = 10.0
"""Resolution of the time of a copy's last use."""
_LOG_WAIT_S = 30.0
"""Seconds between two messages about a wait for another process."""
_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """LAVIC_CACHE, or `lavic` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LAVIC_CACHE") or Path(home) / "lavic")


def shard_folder() -> Path:
    """The default folder of the cache.

    `shards` in LAVIC_CACHE; else in `lavic-<uid>` in a job's temporary folder (SLURM_TMPDIR) or in TMPDIR, which is
    more often on a local disk than the home folder; else in the user's cache folder.
    """
    if not os.environ.get("LAVIC_CACHE"):
        for name in ("SLURM_TMPDIR", "TMPDIR"):
            if os.environ.get(name):
                folder = Path(os.environ[name]) / f"lavic-{os.getuid()}"
                if not folder.exists() or folder.stat().st_uid == os.getuid():  # another user may have made it
                    return folder / "shards"
    return cache_folder() / "shards"


class ShardCache:
    """A folder of copies. Any number of processes may share it; each has its own `ShardCache`.

    A shard is downloaded once, however many processes and threads request it at the same time. The folder should be on
    a local disk: on a network file system without locks several processes may download the same shard, and a copy that
    another machine removes may disappear during a read.
    """

    def __init__(self, folder: Path, limit: int, *, backoff_s: float = BACKOFF_S) -> None:
        """Creates nothing before the first download. `limit` is in bytes, downloads in progress included."""
        self.folder, self.limit = folder, limit
        self._backoff_s = backoff_s

    def read(self, shard: RemoteShard, start: int, end: int) -> bytes:
        """Bytes of a shard, from `start` up to `end`; downloads it if it is not in the cache.

        Raises:
            DataError: The shard is missing in the store, or has another size.
            ConfigError: The folder cannot be written to, or is too small for the shard.
            LavicError: The store does not respond, or the disk is full.
        """
        file = self._open_or_download(shard, wait=True)
        assert file is not None
        try:
            return os.pread(file, end - start, start)
        except OSError as error:
            raise self._unusable(error) from None
        finally:
            os.close(file)

    def fetch(self, shard: RemoteShard, *, wait: bool = True) -> bool:
        """Downloads a shard unless it is in the cache; returns whether the cache has it now. Raises as `read`.

        Without `wait`, a shard that another process is downloading is left to it: the only case of False.
        """
        file = self._open_or_download(shard, wait=wait)
        if file is None:
            return False
        os.close(file)
        return True

    def holds(self, shard: RemoteShard) -> bool:
        """Whether the cache has a copy."""
        try:
            return self.path(shard).stat().st_size == shard.bytes
        except OSError:
            return False

    def path(self, shard: RemoteShard) -> Path:
        """The path of a shard's copy."""
        return self.folder / f"{shard.sha256}.tar"

    def _open(self, shard: RemoteShard) -> int | None:
        try:
            file = os.open(self.path(shard), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from None
        status = os.fstat(file)
        if status.st_size != shard.bytes:
            os.close(file)
            return None
        if time.time() - status.st_mtime > _TOUCH_S:
            with suppress(OSError):  # another user's cache, which is read-only here
                os.utime(file)
        return file

    def _open_or_download(self, shard: RemoteShard, *, wait: bool) -> int | None:
        """The open copy; without `wait` None for a shard that another process is downloading."""
        if (file := self._open(shard)) is not None:
            return file
        if shard.bytes > self.limit:
            raise ConfigError(
                f"{shard.path} has {shard.bytes:,} bytes, more than the limit of the cache {self.folder} "
                f"({self.limit:,}): raise --cache.bytes"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f".{shard.sha256}.lock") as lock:
                while not lock.acquire(_LOG_WAIT_S if wait else 0.0):
                    if not wait:
                        return None
                    log.info("%s: waiting for another process that is downloading it", shard.path)
                if (file := self._open(shard)) is None:
                    file = self._download(shard)
                if not lock.unsupported:  # without locks, the lock file marks a download in progress
                    lock.remove()
                return file
        except OSError as error:
            raise self._unusable(error) from None

    def _download(self, shard: RemoteShard) -> int:
        """Downloads a shard while its lock is held; returns the open copy.

        The file stays open, so that it can be read even if another process removes it at once to make room.
        """
        part = self.folder / f".{shard.sha256}.{uuid.uuid4().hex[:8]}.part"
        file = self._reserve(part, shard)
        try:
            problem = ""
            for attempt in range(ATTEMPTS):
                if attempt:
                    pause = self._backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                    log.warning("%s: %s; retrying in %.1f s", shard.path, problem, pause)
                    time.sleep(pause)
                problem = copy_shard(shard, file)
                if not problem:
                    os.fsync(file)
                    part.replace(self.path(shard))
                    return file
            raise LavicError(
                f"{shard.path}: {problem}, {ATTEMPTS} times: check the store, and the set with lavic verify"
            )
        except BaseException:
            os.close(file)
            part.unlink(missing_ok=True)
            raise

    def _reserve(self, part: Path, shard: RemoteShard) -> int:
        """Makes room for a download and reserves it: the file has its final size from the beginning."""
        while True:
            with FileLock(self.folder / ".room.lock") as lock:
                while not lock.acquire(_LOG_WAIT_S):
                    log.info("%s: waiting for another process that is removing old copies", self.folder)
                if self._make_room(shard):
                    file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                    os.truncate(file, shard.bytes)
                    return file
            time.sleep(0.1)  # other downloads fill the cache: their copies may be removed once they are complete

    def _make_room(self, shard: RemoteShard) -> bool:
        """Removes the least recently used copies until a shard fits; returns whether it does.

        Raises:
            OSError: The disk is full of other files.
        """
        copies: list[tuple[float, int, str]] = []
        downloading = unallocated = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    if entry.name.endswith(".part"):
                        if _is_abandoned(Path(entry.path)):
                            Path(entry.path).unlink()
                        else:
                            downloading += status.st_size
                            unallocated += max(0, status.st_size - 512 * status.st_blocks)
                    elif entry.name.endswith(".tar"):
                        copies.append((status.st_mtime, status.st_size, entry.path))
        copies.sort(reverse=True)
        used = downloading + sum(size for _, size, _ in copies)
        while True:
            disk = os.statvfs(self.folder)
            free = disk.f_bavail * disk.f_frsize - unallocated
            if used + shard.bytes <= self.limit and free >= shard.bytes:
                return True
            if not copies:
                break
            _, size, path = copies.pop()
            with suppress(FileNotFoundError):
                Path(path).unlink()
            used -= size
        if downloading:
            return False
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _unusable(self, error: OSError) -> LavicError:
        reason = error.strerror or first_line(error)
        if error.errno in _FULL:
            return LavicError(
                f"{self.folder}: no room for another shard ({reason}): make room on this disk, or use another "
                "--cache.folder"
            )
        return ConfigError(f"{self.folder}: the cache of shards cannot be used ({reason}): use another --cache.folder")


def _is_abandoned(part: Path) -> bool:
    """Whether the process that wrote a download has ended: no process holds its lock."""
    _, sha256, _ = part.name.split(".", 2)
    lock = part.with_name(f".{sha256}.lock")
    return not lock.exists() or is_held(lock) is False
