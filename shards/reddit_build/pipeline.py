"""Runs the steps of `lavic reddit` in their order, on what is not done yet."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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


class Pipeline:
    """The steps on files, whose results stand in the work folder."""

    def __init__(self, work: WorkFolder, ray: RaySettings, *, on_ray: bool) -> None:
        """Runs steps in a work folder, within a `ray_session` of the caller's where they run on Ray.

        Args:
            work: Where their results stand.
            ray: Workers.
            on_ray: Whether they run on Ray.
        """
        self.work, self._ray, self._on_ray = work, ray, on_ray

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any], doing: str, unit: str = "files") -> Results:
        """Runs a step on the tasks that are not done; returns the results of all, by the task's output."""
        results = {str(task.out): is_done(task.out) for task in tasks}
        todo = [task for task in tasks if results[str(task.out)] is None]
        if todo:
            log.info("%s: %d of %d %s", doing, len(todo), len(tasks), unit)
        with progress_bar(len(tasks), unit, doing, initial=len(tasks) - len(todo), shown=bool(todo)) as bar:
            for task, result in run_tasks(function, todo, self._ray, on_ray=self._on_ray):
                results[str(task.out)] = result
                bar.update(1)
        return {name: result for name, result in results.items() if result is not None}

    def catalogue(self, items: dict[str, str], reviews: dict[str, str]) -> tuple[Path, Counter[str]]:
        """The folder of the catalogue's tables, and counts of its records.

        Raises:
            DataError: A file cannot be read, the catalogue has no item of Amazon's, or a file has no review.
        """
        folder = self.work.path / "table"
        tasks = [FileTask(path=path, out=self.work.file("table", key), kind="items") for path, key in items.items()]
        tasks += [
            FileTask(path=path, out=self.work.file("reviews", key), kind="reviews") for path, key in reviews.items()
        ]
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
        tasks = [
            FileTask(path=path, out=self.work.file("scan", key), kind="dump", table=table, short=short)
            for path, key in dumps.items()
        ]
        return tasks, self.run(scan_step, tasks, "searching links")

    def gather(self, dumps: dict[str, str], wanted: Path) -> tuple[list[Path], Counter[str]]:
        """The posts of the wanted submissions: the files that hold them, and counts."""
        tasks = [
            FileTask(path=path, out=self.work.file("gather", key), kind="dump", table=wanted)
            for path, key in dumps.items()
        ]
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

        Args:
            function: A step on some buckets.
            task: Its task, but for the fields of `PartTask`.
            spools: The posts.
            bucket_bytes: As many are read at a time, at most.
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
    first, held = 0, 0
    for n, size in enumerate(np.asarray(sizes).tolist()):
        if n > first and held + size > most_bytes:
            parts.append((first, n))
            first, held = n, 0
        held += size
    return [*parts, (first, BUCKETS)]


def sum_counts(results: Iterable[dict[str, Any]]) -> Counter[str]:
    """The counts of all results together."""
    total: Counter[str] = Counter()
    for result in results:
        total.update(result["counts"])
    return total
