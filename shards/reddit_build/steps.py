"""What workers do: a function per step, from a plain task to plain counts. Each writes its files, the last one last."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavic.data.reddit.clean_text import context_text
from lavic.data.reddit.dumps.gather import gather_dump, read_buckets
from lavic.data.reddit.dumps.id_table import Table
from lavic.data.reddit.dumps.scan import scan_dump
from lavic.data.reddit.item_table import ItemTable, read_catalogue, read_reviews
from lavic.data.reddit.near_duplicates import exact_hash, signature_of
from lavic.data.reddit.settings import LabelSettings
from lavic.data.reddit.splits import SUBMISSION
from lavic.data.reddit.threads import Threads, author_hash
from lavic.storage.atomic import atomic_open, atomic_write


@dataclass(frozen=True, kw_only=True)
class FileTask:
    """One file of the input."""

    path: str
    out: Path
    """File to write; its counts are beside it."""
    kind: str
    """`items`, `reviews` or `dump`."""
    table: Path | None = None
    """Folder of the catalogue, or the table of wanted submissions."""
    short: bool = False
    """Whether to list short links."""


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """Some buckets."""

    first: int
    end: int
    out: Path
    """Conversations to write; their counts are beside them."""
    spools: tuple[Path, ...]
    """The posts of all dumps."""


@dataclass(frozen=True, kw_only=True)
class ThreadsTask(PartTask):
    """Some buckets to make conversations of; their submissions are written too."""

    table: Path
    labels: LabelSettings
    bots: frozenset[str]
    resolved: Path | None
    """JSON object of short links and their items."""


def counts_of(out: Path) -> Path:
    """The counts of a step, which are there once it is complete."""
    return out.with_name(f"{out.name}.counts.json")


def submissions_of(out: Path) -> Path:
    """The submissions of a part: rows of `SUBMISSION`, in the order of the conversations."""
    return out.with_name(f"{out.name}.submissions")


def catalogue_step(task: FileTask) -> dict[str, Any]:
    """Reads a file of items or reviews into a table."""
    counts = (read_catalogue if task.kind == "items" else read_reviews)(task.path, task.out)
    return counted(task.out, {"counts": counts})


def scan_step(task: FileTask) -> dict[str, Any]:
    """Finds the submissions of a dump with links to items."""
    assert task.table is not None
    counts, unresolved = scan_dump(task.path, task.out, ItemTable(task.table), short=task.short)
    return counted(task.out, {"counts": counts, "short": unresolved})


def gather_step(task: FileTask) -> dict[str, Any]:
    """Collects the posts of the wanted submissions from a dump."""
    assert task.table is not None
    counts = gather_dump(task.path, Table(task.table), task.out)
    return counted(task.out, {"counts": counts})


def threads_step(task: ThreadsTask) -> dict[str, Any]:
    """Makes the conversations of some buckets."""
    resolved = json.loads(task.resolved.read_text("utf-8")) if task.resolved else {}
    threads = Threads(
        read_buckets(task.spools, task.first, task.end), ItemTable(task.table), task.labels, task.bots, resolved
    )
    rows: Counter[int] = Counter()
    with atomic_open(task.out) as file:
        for example in threads.examples():
            rows[example.submission] += 1
            file.write(json.dumps(asdict(example)).encode() + b"\n")
    submissions = np.zeros(len(rows), SUBMISSION)
    for n, (id, count) in enumerate(rows.items()):
        post = threads.submissions[id]
        text = context_text(f"{post.title}\n{post.text}")
        exact = exact_hash(text, author_hash(post.author))
        submissions[n] = (id, post.created, count, post.crosspost, exact, signature_of(text))
    with atomic_open(submissions_of(task.out)) as file:
        file.write(submissions.tobytes())
    return counted(task.out, {"counts": dict(threads.counts)})


def is_done(out: Path) -> dict[str, Any] | None:
    """What a step has returned, where it is complete."""
    path = counts_of(out)
    result: dict[str, Any] | None = json.loads(path.read_text("utf-8")) if path.exists() else None
    return result


def counted(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Writes what a step returns, which marks its output as complete."""
    atomic_write(counts_of(out), json.dumps(result))
    return result
