"""Makes the set of `lavic reddit`: the steps on files and parts, then the splits and the files of the set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from lavic.data.reddit.funnel import BROKEN, COMMENTS, NOTES, POSTS
from lavic.data.reddit.item_table import ItemTable
from lavic.data.reddit.set_writer import write_set
from lavic.data.reddit.splits import split_submissions
from lavic.errors import DataError
from lavic.shards.reddit_build.pipeline import Pipeline, merge_wanted, sum_counts
from lavic.shards.reddit_build.short_links import resolve_links
from lavic.shards.reddit_build.steps import ThreadsTask, submissions_of, threads_step
from lavic.shards.reddit_settings import RedditSettings


def build_set(
    settings: RedditSettings,
    pipeline: Pipeline,
    *,
    dumps: dict[str, str],
    items: dict[str, str],
    reviews: dict[str, str],
    bots: frozenset[str],
) -> dict[str, Any]:
    """Writes the conversations and their ids; returns the counts of the funnel.

    For `dumps`, `items` and `reviews` see `input_files`; `bots` are in lower case.

    Raises:
        DataError: A file cannot be read, or no conversation is in the dumps.
    """
    work = pipeline.work
    table, catalogue = pipeline.catalogue(items, reviews)
    scans, scanned = pipeline.scan(dumps, table, short=settings.short_links.resolve)
    hits, resolved = [task.out for task in scans], None
    notes: dict[str, int] = {}
    if settings.short_links.resolve:
        short_links = [scanned[str(task.out)]["short"] for task in scans]
        resolved, linked_submissions, notes = resolve_links(
            settings.short_links, settings.out, work, short_links, ItemTable(table)
        )
        hits.append(linked_submissions)
    submission_table = merge_wanted(work.path / "wanted", hits)
    gathered, collected = pipeline.gather(dumps, submission_table)
    task = partial(ThreadsTask, table=table, labels=settings.labels, bots=bots, resolved=resolved)
    parts, counts = pipeline.make(threads_step, task, gathered, settings.bucket_bytes)
    if not counts["kept"]:
        raise DataError(f"no conversation is left: {_reasons(counts, sum_counts(scanned.values()))}")
    submissions = [submissions_of(part) for part in parts]
    splits = split_submissions(submissions, settings.split)
    written = write_set(settings.out, parts, submissions, splits.parts, ItemTable(table))
    return {
        "catalogue": dict(sorted(catalogue.items())),
        "lines": dict(sorted(sum_counts(scanned.values()).items())),
        "posts": {**{name: counts[name] for name in POSTS}, **{name: collected[name] for name in BROKEN}},
        "comments": {name: counts[name] for name in COMMENTS},
        "notes": {**{name: counts[name] for name in NOTES}, **notes},
        "duplicates": {"groups": splits.groups, "grouped": splits.grouped, "moved": splits.moved},
        **written,
        "settings": {**_flat("labels", asdict(settings.labels)), **_flat("split", asdict(settings.split))},
    }


def _flat(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in values.items()}


def _reasons(counts: Counter[str], lines: Counter[str]) -> str:
    """The most frequent reasons for which nothing was kept."""
    if counts["linking"]:
        dropped = {
            COMMENTS[name]: counts[name] for name in COMMENTS if name not in ("linking", "kept") and counts[name]
        }
        return f"of {counts['linking']:,} comments that link to an item " + ", ".join(
            f"{count:,} {words}" for words, count in sorted(dropped.items(), key=lambda entry: -entry[1])
        )
    return (
        f"of {lines['lines']:,} lines none is a comment that links to an item of the catalogue "
        f"({lines['item_not_in_catalogue']:,} link to other items)"
    )
