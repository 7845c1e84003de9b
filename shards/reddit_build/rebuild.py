"""`lavic reddit rebuild`: a set again from its ids and the dumps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lavic.data.reddit.dumps.dump_file import check_dump
from lavic.data.reddit.dumps.gather import read_buckets
from lavic.data.reddit.dumps.id_table import bucket_of, write_table
from lavic.data.reddit.dumps.post import is_gone
from lavic.data.reddit.id_manifest import Entry, digest_of_row, read_entries, row_line
from lavic.data.reddit.item_table import ItemTable
from lavic.data.reddit.settings import LabelSettings
from lavic.data.reddit.splits import NAMES
from lavic.data.reddit.threads import Threads, render_conversation
from lavic.errors import ConfigError, DataError
from lavic.shards.reddit_build.pipeline import Pipeline
from lavic.shards.reddit_build.steps import PartTask, counted
from lavic.shards.reddit_build.work_folder import WorkFolder
from lavic.shards.reddit_settings import RebuildSettings
from lavic.storage.atomic import atomic_open, atomic_write
from lavic.storage.file_digest import file_sha256

REPORT = "rebuild.json"
"""How much of the set is there again, written last."""


@dataclass(frozen=True, kw_only=True)
class RebuildTask(PartTask):
    """Some buckets of a manifest; the rows are written with their split and number."""

    manifest: Path


def rebuild(settings: RebuildSettings, dumps: dict[str, str], *, on_ray: bool) -> dict[str, int]:
    """Makes the set of the manifest again; returns counts of its rows.

    Raises:
        ConfigError: OUT holds something else.
        DataError: A file cannot be read, or no conversation is in the dumps.
    """
    if (settings.out / "funnel.json").exists():
        raise ConfigError(f"{settings.out}: holds a set of lavic reddit; use another folder")
    files = [settings.manifest / f"{name}.ids.jsonl" for name in NAMES]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file; --manifest is a folder with <split>.ids.jsonl of each split")
    for path in dumps:
        check_dump(path)
    plan: dict[str, Any] = {"dumps": sorted(dumps.values()), "manifest": [file_sha256(file) for file in files]}
    work = WorkFolder(settings.out, {**plan, "bucket_bytes": settings.bucket_bytes})
    ids = {entry.submission for name in NAMES for entry in read_entries(settings.manifest, name)}
    submission_table = work.path / "wanted"
    write_table(submission_table, np.fromiter(ids, np.uint64, len(ids)))
    pipeline = Pipeline(work=work, ray=settings.ray, on_ray=on_ray)
    gathered, _ = pipeline.gather(dumps, submission_table)
    task = partial(RebuildTask, manifest=settings.manifest)
    parts, rebuilt = pipeline.make(rebuild_step, task, gathered, settings.bucket_bytes)
    counts = {**rebuilt, "rows": rebuilt.total()}
    if counts["rows"] == counts["missing"]:
        raise DataError("none of the conversations is in the dumps; are these the right months and subreddits?")
    _write(settings.out, parts)
    atomic_write(settings.out / REPORT, json.dumps(counts, indent=2) + "\n")
    if not settings.keep_work:
        work.remove()
    return counts


def rebuild_step(task: RebuildTask) -> dict[str, Any]:
    """Makes the conversations of some buckets again; what the dumps mark as deleted is not used."""
    threads = Threads(read_buckets(task.spools, task.first, task.end), _NoItems(), LabelSettings())
    counts = {"same": 0, "changed": 0, "missing": 0}
    with atomic_open(task.out) as file:
        for entry in _entries(task):
            row = _row(entry, threads)
            if row is None:
                counts["missing"] += 1
                continue
            line = row_line(row)
            counts["same" if digest_of_row(line) == entry.digest else "changed"] += 1
            file.write(json.dumps([NAMES.index(entry.split), entry.number, row]).encode() + b"\n")
    return counted(task.out, {"counts": counts})


class _NoItems(ItemTable):
    """No catalogue: the manifest names the items."""

    def __init__(self) -> None:
        pass

    def parents(self, asins: Sequence[str]) -> list[str]:
        return [""] * len(asins)


def _entries(task: RebuildTask) -> Iterator[Entry]:
    for name in NAMES:
        for entry in read_entries(task.manifest, name):
            if task.first <= bucket_of(entry.submission) < task.end:
                yield entry


def _row(entry: Entry, threads: Threads) -> dict[str, Any] | None:
    submission = threads.submissions.get(entry.submission)
    path = [threads.comments.get(turn) for turn in entry.turns]
    comment = threads.comments.get(entry.comment)
    posts = [post for post in (submission, *path, comment) if post is not None and not post.gone]
    if len(posts) != len(path) + 2 or is_gone(posts[0].title):
        return None
    conversation = render_conversation(posts[0], posts[1:-1], posts[-1])
    if conversation is None:
        return None
    context, gt = conversation
    return {"context": context, "context_items": entry.context_items, "gt": gt, "gt_items": entry.gt_items}


def _write(folder: Path, parts: Sequence[Path]) -> None:
    """The rows of all parts in the order of the manifest: parts follow the buckets, as the set's own files do."""
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_open(folder / f"{name}.jsonl")) for name in NAMES]
        for part in parts:
            with part.open("rb") as lines:
                for line in lines:
                    split, _, row = json.loads(line)
                    files[split].write(row_line(row))
