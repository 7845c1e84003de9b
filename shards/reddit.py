"""`lavic reddit`: conversations from Reddit dumps and an Amazon catalogue.

lavic reddit --dumps dumps/R[CS]_*.zst --items meta_*.jsonl.gz --reviews reviews/*.jsonl.gz --out conversations
lavic reddit rebuild --manifest shared/ --dumps dumps/R[CS]_*.zst --out conversations
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lavic.config import parse
from lavic.data.reddit.card import card_html, card_markdown
from lavic.data.reddit.dumps.dump_file import check_dump
from lavic.data.reddit.splits import NAMES
from lavic.distributed.ray_session import RaySettings, ray_session
from lavic.errors import ConfigError
from lavic.shards.cluster.executor import Executor, stop_on_signal, uses_ray
from lavic.shards.cluster.worker_process import prepare
from lavic.shards.reddit_build import steps
from lavic.shards.reddit_build.build_set import build_set
from lavic.shards.reddit_build.pipeline import Pipeline
from lavic.shards.reddit_build.rebuild import rebuild
from lavic.shards.reddit_build.work_folder import WorkFolder, digest_of, input_files
from lavic.shards.reddit_settings import RebuildSettings, RedditSettings
from lavic.storage.atomic import atomic_write
from lavic.storage.output_folder import lock_output_folder
from lavic.storage.paths import as_path, storage_errors
from lavic.storage.text_files import read_lines

DESCRIPTION = """Make conversations from dumps of Reddit and a catalogue of Amazon's items.

A comment that links to an item of the catalogue, by someone other than the original poster, is a recommendation: its
conversation is the submission and the comments on the way to it. OUT gets train.jsonl, valid.jsonl and test.jsonl in
the LaViC format, the ids of each (`<split>.ids.jsonl`, without text), card.md and card.html, inputs.json with the files
it was made of, and funnel.json with every count, written last. Then `lavic retrieve` adds candidates.

The dumps are read twice: for the submissions with links, then for the posts of these. The posts are kept in buckets by
submission, and one part of the buckets is in a worker's memory at a time. The same command resumes after a crash, with
the files and parts that were not done; the set's bytes do not depend on workers, on restarts, or on how the rows are
spread over files. Posts that were deleted or removed are not used. Short links are counted, and resolved only with
--short-links.resolve.

`lavic reddit rebuild --manifest DIR --dumps FILES --out DIR` rebuilds a set from its ids.
"""

log = logging.getLogger(__name__)

resolve = partial(parse, RedditSettings, command="reddit", description=DESCRIPTION)
"""The settings of a command line; see `lavic.cli.command_module`."""

FUNNEL, INPUTS = "funnel.json", "inputs.json"
MAX_LOCAL_BYTES = 8 << 30
"""Local processes read so much in about the time after which several nodes pay."""
_KEPT = "finished files and parts"


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if argv[:1] == ["rebuild"]:
        chosen = parse(RebuildSettings, argv[1:], command="reddit rebuild")
        with stop_on_signal(_KEPT), lock_output_folder(chosen.out):
            dumps = input_files(chosen.dumps, "dump")
            with _workers(chosen.executor, chosen.ray, dumps) as on_ray:
                counts = rebuild(chosen, dumps, on_ray=on_ray)
        print(f"{chosen.out}: {counts['same']:,} of {counts['rows']:,} conversations as they were", end="")
        print(f"; {counts['changed']:,} whose text has changed; {counts['missing']:,} that are not there any more")
        return 0
    settings = resolve(argv)
    with stop_on_signal(_KEPT), lock_output_folder(settings.out):
        funnel = build(settings)
    rows = {name: split["rows"] for name, split in funnel["splits"].items()}
    print(f"{settings.out}: {sum(rows.values()):,} conversations (", end="")
    print(", ".join(f"{name} {count:,}" for name, count in rows.items()) + f"); see {settings.out / 'card.md'}")
    return 0


def build(settings: RedditSettings) -> dict[str, Any]:
    """Makes the set of the settings, or what is missing of it; returns its counts.

    Raises:
        ConfigError: OUT holds a set of other settings or files.
        DataError: A file cannot be read, or no conversation is in the dumps.
    """
    dumps, items = input_files(settings.dumps, "dump"), input_files(settings.items, "catalogue file")
    reviews = input_files(settings.reviews, "review file") if settings.reviews else {}
    bots = frozenset(line.strip().lower() for _, line in read_lines(settings.bots)) if settings.bots else frozenset()
    plan = {
        "dumps": sorted(dumps.values()),
        "items": sorted(items.values()),
        "reviews": sorted(reviews.values()),
        "labels": asdict(settings.labels),
        "split": asdict(settings.split),
        "bots": sorted(bots),
        "short_links": settings.short_links.resolve,
    }
    if funnel := _complete(settings.out, digest_of(plan)):
        log.info("%s is complete already", settings.out)
        return funnel
    for path in dumps:
        check_dump(path)
    work = WorkFolder(settings.out, {**plan, "bucket_bytes": settings.bucket_bytes})
    with _workers(settings.executor, settings.ray, dumps) as on_ray:
        pipeline = Pipeline(work=work, ray=settings.ray, on_ray=on_ray)
        funnel = build_set(settings, pipeline, dumps=dumps, items=items, reviews=reviews, bots=bots)
    files = {"dumps": list(dumps), "items": list(items), "reviews": list(reviews)}
    atomic_write(settings.out / INPUTS, json.dumps({"plan": digest_of(plan), **files}, indent=2) + "\n")
    atomic_write(settings.out / "card.md", card_markdown(funnel))
    atomic_write(settings.out / "card.html", card_html(funnel))
    atomic_write(settings.out / FUNNEL, json.dumps(funnel, indent=2) + "\n")
    _warn(funnel)
    if not settings.keep_work:
        work.remove()
    return funnel


@contextmanager
def _workers(executor: Executor, ray: RaySettings, dumps: Mapping[str, str]) -> Iterator[bool]:
    """Starts what the steps run on; yields whether that is Ray."""
    size = sum(as_path(path).stat().st_size for path in dumps)
    if uses_ray(executor, ray, large=size > MAX_LOCAL_BYTES):
        with ray_session(ray):
            yield True
        return
    prepare(steps.__name__)
    yield False


def _complete(out: Path, plan: str) -> dict[str, Any] | None:
    """The counts of a set that is complete; None where there is none."""
    if not (out / FUNNEL).exists():
        return None
    try:
        funnel: dict[str, Any] = json.loads((out / FUNNEL).read_text("utf-8"))
        made_of = json.loads((out / INPUTS).read_text("utf-8"))["plan"]
    except storage_errors(ValueError, KeyError):
        made_of, funnel = "", {}
    if made_of != plan:
        raise ConfigError(f"{out}: holds a set of other files or settings; use another folder, or remove it")
    return funnel


def _warn(funnel: Mapping[str, Any]) -> None:
    empty = [name for name in NAMES if not funnel["splits"][name]["rows"]]
    if empty:
        log.warning("no conversation in %s: see --split.valid-share, --split.test-share and the days", ", ".join(empty))
    broken = funnel["catalogue"].get("broken_records", 0)
    if broken:
        log.warning("%d broken records of the catalogue were left out", broken)
