"""Runs the steps of `lavic reddit` in their order, on what is not done yet."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavic.data.reddit.dumps.gather import bucket_sizes
from lavic.data.reddit.dumps.id_table import BUCKETS, merge_tables
from lavic.data.reddit.item_table import ItemTable, first_broken, merge_catalogue
from lavic.distributed.ray_session import RaySettings
from lavic.errors import DataError
from lavic.shards.cluster.tasks import run_tasks
from lavic.shards.reddit_build.steps import (
    FileTask,
    PartTask,
    catalogue_step,
    gather_step,
    is_done,
    scan_step,
)
from lavic.shards.reddit_build.work_folder import WorkFolder
from lavic.tracking.progress import progress_bar

log = logging.getLogger(__name__)

Results = dict[str, dict[str, Any]]
"""What a step returned, by the name of its output."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The steps on files, whose results are in the work folder."""

    work: WorkFolder
    ray: RaySettings
    on_ray: bool
    """Whether the steps run on Ray, within a `ray_session` of the caller's."""

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any], doing: str, unit: str = "files") -> Results:
        """Runs a step on the tasks that are not done; returns the results of all, by the task's output."""
        results = {str(task.out): is_done(task.out) for task in tasks}
        unfinished = [task for task in tasks if results[str(task.out)] is None]
        if unfinished:
            log.info("%s: %d of %d %s", doing, len(unfinished), len(tasks), unit)
        with progress_bar(len(tasks), unit, doing, initial=len(tasks) - len(unfinished), shown=bool(unfinished)) as bar:
            for task, result in run_tasks(function, unfinished, self.ray, on_ray=self.on_ray):
                results[str(task.out)] = result
                bar.update(1)
        return {name: result for name, result in results.items() if result is not None}

    def _tasks(self, step: str, files: dict[str, str], **values: Any) -> list[FileTask]:
        return [FileTask(path=path, out=self.work.file(step, name), **values) for path, name in files.items()]

    def catalogue(self, items: dict[str, str], reviews: dict[str, str]) -> tuple[Path, Counter[str]]:
        """The folder of the catalogue's tables, and counts of its records.

        Raises:
            DataError: A file cannot be read, the catalogue has no item of Amazon's, or a file has no review.
        """
        folder = self.work.path / "table"
        tasks = [*self._tasks("table", items, kind="items"), *self._tasks("reviews", reviews, kind="reviews")]
        results = self.run(catalogue_step, tasks, "reading the catalogue")
        counts = sum_counts(results.values())
        tables = [task.out for task in tasks if task.kind == "items"]
        if counts["items"] == counts["items_without_an_amazon_id"]:
            broken = f", {counts['broken_records']:,} broken records" if counts["broken_records"] else ""
            first = f"; the first: {first_broken(tables)}" if broken else ""
            raise DataError(
                f"{', '.join(items)}: no item with an id of Amazon's ({counts['items']:,} items{broken}{first})"
            )
        for task in tasks:
            read = results[str(task.out)]["counts"]
            if task.kind == "reviews" and read["reviews"] == read["broken_reviews"]:
                raise DataError(
                    f"{task.path}: none of its {read['reviews']:,} lines is a review with `asin` and `parent_asin`: "
                    "--reviews takes the review files of Amazon Reviews 2023"
                )
        if not ItemTable.is_complete(folder):
            merge_catalogue(folder, tables, [task.out for task in tasks if task.kind == "reviews"])
        return folder, counts

    def scan(self, dumps: dict[str, str], table: Path, *, short: bool) -> tuple[list[FileTask], Results]:
        """The submissions with links to items of each dump."""
        tasks = self._tasks("scan", dumps, kind="dump", table=table, short=short)
        return tasks, self.run(scan_step, tasks, "searching links")

    def gather(self, dumps: dict[str, str], wanted: Path) -> tuple[list[Path], Counter[str]]:
        """The posts of the wanted submissions: the files that hold them, and counts."""
        tasks = self._tasks("gather", dumps, kind="dump", table=wanted)
        results = self.run(gather_step, tasks, "collecting threads")
        return [task.out for task in tasks], sum_counts(results.values())

    def make(
        self,
        function: Callable[[Any], Any],
        task: Callable[..., PartTask],
        spools: Sequence[Path],
        bucket_bytes: int,
    ) -> tuple[list[Path], Counter[str]]:
        """The conversations of all buckets: the files that hold them, and counts.

        Each task is made by `task` from the fields of a `PartTask`, and reads at most `bucket_bytes` of posts.
        """
        tasks = [
            task(first=first, end=end, out=self.work.file("threads", f"{first:04}-{end:04}"), spools=tuple(spools))
            for first, end in parts_of(spools, bucket_bytes)
        ]
        results = self.run(function, tasks, "making conversations", "parts")
        return [part.out for part in tasks], sum_counts(results.values())


def merge_wanted(path: Path, tables: Sequence[Path]) -> Path:
    """One table of all submissions that are wanted."""
    if not path.exists():
        merge_tables(path, tables, with_values=False)
    return path


def parts_of(spools: Sequence[Path], most_bytes: int) -> list[tuple[int, int]]:
    """Ranges of buckets that hold at most so many bytes, one bucket at least: first and end."""
    sizes = bucket_sizes(spools)
    parts: list[tuple[int, int]] = []
    first, bytes_in_part = 0, 0
    for n, size in enumerate(np.asarray(sizes).tolist()):
        if n > first and bytes_in_part + size > most_bytes:
            parts.append((first, n))
            first, bytes_in_part = n, 0
        bytes_in_part += size
    return [*parts, (first, BUCKETS)]


def sum_counts(results: Iterable[dict[str, Any]]) -> Counter[str]:
    """The counts of all results together."""
    total: Counter[str] = Counter()
    for result in results:
        total.update(result["counts"])
    return total
