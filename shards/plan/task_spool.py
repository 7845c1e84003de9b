"""The tasks of a plan on disk, grouped by the picture that they show, and split into shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lavic.data.sources.image_links import picture_of
from lavic.shards.plan.counts import PlanCounts
from lavic.shards.plan.external_dedup import ExternalDedup, hash64
from lavic.shards.plan.photo_tasks import PhotoTask, read_task, task_line

_CHUNK = 1 << 20


class TaskSpool:
    """Tasks on disk, in the catalogue's order, until it is known which of them show the same picture."""

    def __init__(self, folder: Path) -> None:
        """Start in an empty folder, which must stay until the end."""
        self._path, self._starts = folder / "tasks", folder / "starts"
        self._file: BinaryIO = self._path.open("wb")
        self._offsets: BinaryIO = self._starts.open("wb")
        self._keys, self._pictures = ExternalDedup(folder / "keys"), ExternalDedup(folder / "pictures")
        self._at = 0
        self.untitled = 0
        """Number of tasks, from the first, whose text becomes empty."""

    def add(self, task: PhotoTask) -> None:
        """Append a task."""
        line = task_line(task)
        self._offsets.write(self._at.to_bytes(8, "little"))
        self._at += self._file.write(line)
        self._keys.add(hash64(task.key))
        self._pictures.add(hash64(picture_of(task.url)))

    def __len__(self) -> int:
        return len(self._keys)

    def groups(self, limit: int, counts: PlanCounts) -> Iterator[list[bytes]]:
        """Lines of photos that show one picture, at most `limit`; repeated photos are left out and counted."""
        self._file.close()
        self._offsets.close()
        repeated = _later(self._keys.first_equal())
        first_numbers = self._pictures.first_equal(repeated, limit)
        follows = _later(first_numbers) & ~repeated
        # Only followers and their leaders are in memory: 16 bytes each.
        followers = np.flatnonzero(follows)
        leaders = np.asarray(first_numbers[followers])
        order = np.argsort(leaders, kind="stable")
        followers, leaders = followers[order], leaders[order]
        counts.repeated, counts.shared = int(repeated.sum()), len(followers)
        counts.photos = len(repeated) - counts.repeated
        if not len(repeated):
            return
        starts = np.memmap(self._starts, "<u8", "r")
        index = 0
        with self._path.open("rb") as lines, self._path.open("rb") as followed:
            for number, line in enumerate(lines):
                if repeated[number] or follows[number]:
                    continue
                group = [self._final(number, line)]
                while index < len(leaders) and leaders[index] == number:
                    followed.seek(int(starts[followers[index]]))
                    follower = read_task(self._final(int(followers[index]), followed.readline()))
                    group.append(task_line(replace(follower, same_as=read_task(line).key)))
                    index += 1
                yield group

    def _final(self, number: int, line: bytes) -> bytes:
        return line if number >= self.untitled else task_line(replace(read_task(line), text=""))


def _later(first_numbers: np.ndarray) -> np.ndarray:
    """Which numbers have an earlier first: bool [n], computed in pieces."""
    later = np.empty(len(first_numbers), bool)
    for start in range(0, len(first_numbers), _CHUNK):
        piece = first_numbers[start : start + _CHUNK]
        later[start : start + _CHUNK] = piece != np.arange(start, start + len(piece), dtype=np.uint64)
    return later


def split_into_shards(groups: Iterable[list[bytes]], limit: int) -> Iterator[list[bytes]]:
    """Split groups into shards of at most `limit` photos, in order; a group is never split."""
    shard: list[bytes] = []
    for group in groups:
        if shard and len(shard) + len(group) > limit:
            yield shard
            shard = []
        shard += group
    if shard:
        yield shard
