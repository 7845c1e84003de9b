"""Copies of an object store's shards on this machine's disk, shared by all of its processes and bounded by bytes.

A copy is known by the sha256 that the manifest gives: a repacked shard is another file, and two sets with the same
shard share a copy.

FOLDER/<sha256>.tar          a whole copy, checked; its time of change is that of its last use, about
       .<sha256>.lock        held by the process that downloads it
       .<sha256>.<id>.part   a download; in no use once nobody holds the lock
       .room.lock            held while room is made

A reader opens a copy for one read. So nothing is pinned: a copy may be removed at any time, who is reading it reads on
(Linux keeps an open file that has no name), and its bytes are free a moment later. Who finds no copy downloads it.
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
"""How often a shard is asked for before its download fails."""
BACKOFF_S = 0.5
"""Wait before the second attempt; each later one is twice as long."""
_TOUCH_S = 10.0
"""How exactly the time of a copy's last use is kept."""
_PATIENCE_S = 30.0
"""After which a wait for another process is announced."""
_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """LAVIC_CACHE, or `lavic` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LAVIC_CACHE") or Path(home) / "lavic")


def shard_folder() -> Path:
    """Where copies of shards are unless a setting says otherwise.

    `shards` in LAVIC_CACHE; else in `lavic-<uid>` in a job's own temporary folder (SLURM_TMPDIR) or in TMPDIR, which is
    on a disk of the machine more often than the home is; else in the user's cache folder.
    """
    if not os.environ.get("LAVIC_CACHE"):
        for name in ("SLURM_TMPDIR", "TMPDIR"):
            if os.environ.get(name):
                folder = Path(os.environ[name]) / f"lavic-{os.getuid()}"
                if not folder.exists() or folder.stat().st_uid == os.getuid():  # else somebody else's copies
                    return folder / "shards"
    return cache_folder() / "shards"


class ShardCache:
    """A folder of copies. Any number of processes may share it; each makes its own `ShardCache`.

    A shard is downloaded once, however many processes and threads ask for it at the same time. The folder should be on
    a disk of this machine: on a network file system without locks several processes may download the same shard, and a
    copy that another machine removes may be gone in the middle of a read.
    """

    def __init__(self, folder: Path, limit: int, *, backoff_s: float = BACKOFF_S) -> None:
        """Describe a cache; nothing is made before the first download.

        Args:
            folder: Where the copies are.
            limit: Most bytes of all copies, those that are still arriving included.
            backoff_s: See `BACKOFF_S`.
        """
        self.folder, self.limit = folder, limit
        self._backoff_s = backoff_s

    def read(self, shard: RemoteShard, start: int, end: int) -> bytes:
        """Bytes of a shard, from `start` up to `end`; downloads it where no copy is there.

        Raises:
            DataError: The store does not have the shard, or has another one under its name.
            ConfigError: The folder cannot be written to, or is too small for the shard.
            LavicError: The store does not answer, or the disk is full.
        """
        file = self._open(shard)
        if file is None:
            file = self._fetch(shard, wait=True)
            assert file is not None
        try:
            return os.pread(file, end - start, start)
        except OSError as error:
            raise self._unusable(error) from None
        finally:
            os.close(file)

    def fetch(self, shard: RemoteShard, *, wait: bool = True) -> bool:
        """See that a copy is there.

        Args:
            shard: The shard.
            wait: Where another process downloads it, wait for its end.

        Returns:
            Whether a copy was there when this returned, as far as is known.

        Raises:
            LavicError: As for `read`.
        """
        file = self._open(shard)
        if file is None:
            file = self._fetch(shard, wait=wait)
        if file is None:
            return False
        os.close(file)
        return True

    def holds(self, shard: RemoteShard) -> bool:
        """Whether a copy is there."""
        try:
            return self.path(shard).stat().st_size == shard.bytes
        except OSError:
            return False

    def path(self, shard: RemoteShard) -> Path:
        """Where the copy of a shard is, once it is there."""
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
            with suppress(OSError):  # a cache that was filled by somebody else, and is read only here
                os.utime(file)
        return file

    def _fetch(self, shard: RemoteShard, *, wait: bool) -> int | None:
        """Download a shard, or wait until another process has; the open copy, or None where that is not waited for."""
        if shard.bytes > self.limit:
            raise ConfigError(
                f"{shard.path} has {shard.bytes:,} bytes, and the cache {self.folder} may hold {self.limit:,}: raise "
                "--cache.bytes"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f".{shard.sha256}.lock")
            began, announced = time.monotonic(), False
            while not lock.acquire(1.0 if wait else 0.0):
                if not wait:
                    return None
                if not announced and time.monotonic() - began > _PATIENCE_S:
                    log.info("%s: waiting for another process, which downloads it", shard.path)
                    announced = True
            with lock:
                file = self._open(shard)
                if file is None:
                    file = self._download(shard)
                if not lock.unsupported:  # else nobody could tell an abandoned download from one that goes on
                    lock.remove()
                return file
        except OSError as error:
            raise self._unusable(error) from None

    def _download(self, shard: RemoteShard) -> int:
        """Download a shard, whose lock is held; returns the open copy.

        It is opened before it has a name: even if it is removed at once to make room for others, it can be read.
        """
        part = self.folder / f".{shard.sha256}.{uuid.uuid4().hex[:8]}.part"
        file = self._reserve(part, shard)
        try:
            problem = ""
            for attempt in range(ATTEMPTS):
                if attempt:
                    pause = self._backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                    log.warning("%s: %s; once more in %.1f s", shard.path, problem, pause)
                    time.sleep(pause)
                problem = copy_shard(shard, file)
                if not problem:
                    os.fsync(file)
                    part.replace(self.path(shard))
                    return file
            raise LavicError(f"{shard.path}: {problem}, {ATTEMPTS} times: is the store reachable and the set whole?")
        except BaseException:
            os.close(file)
            part.unlink(missing_ok=True)
            raise

    def _reserve(self, part: Path, shard: RemoteShard) -> int:
        """Make room for a download and take it at once: the file has its final size from the beginning."""
        while True:
            with FileLock(self.folder / ".room.lock") as room:
                while not room.acquire(_PATIENCE_S):
                    log.info("%s: waiting for another process, which makes room", self.folder)
                if self._make_room(shard):
                    file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                    os.truncate(file, shard.bytes)
                    return file
            time.sleep(0.1)  # what others download fills the cache: their copies may be removed once they are whole

    def _make_room(self, shard: RemoteShard) -> bool:
        """Remove the copies that were used longest ago, until a shard has room; whether it has.

        Raises:
            LavicError: The disk is full, of something else.
        """
        copies: list[tuple[float, int, str]] = []
        arriving = missing = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    if entry.name.endswith(".part"):
                        if _is_abandoned(Path(entry.path)):
                            Path(entry.path).unlink()
                        else:
                            arriving += status.st_size
                            missing += max(0, status.st_size - 512 * status.st_blocks)
                    elif entry.name.endswith(".tar"):
                        copies.append((status.st_mtime, status.st_size, entry.path))
        copies.sort(reverse=True)
        used = arriving + sum(size for _, size, _ in copies)
        while True:
            disk = os.statvfs(self.folder)
            free = disk.f_bavail * disk.f_frsize - missing
            if used + shard.bytes <= self.limit and free >= shard.bytes:
                return True
            if not copies:
                break
            _, size, path = copies.pop()
            with suppress(FileNotFoundError):
                Path(path).unlink()
            used -= size
        if arriving:
            return False
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _unusable(self, error: OSError) -> LavicError:
        reason = error.strerror or first_line(error)
        if error.errno in _FULL:
            return LavicError(
                f"{self.folder}: no room for another shard ({reason}): make room on this disk, or give another "
                "--cache.folder"
            )
        return ConfigError(f"{self.folder}: cannot keep copies of shards here ({reason}): give another --cache.folder")


def _is_abandoned(part: Path) -> bool:
    """Whether the process that wrote a download has ended: its lock is free, or gone."""
    _, sha256, _ = part.name.split(".", 2)
    lock = part.with_name(f".{sha256}.lock")
    return not lock.exists() or is_held(lock) is False
