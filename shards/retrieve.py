"""`lavic retrieve`: candidate lists from a whole catalogue, for every conversation."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from lavic.config import flatten, parse
from lavic.data.catalog import check_readable
from lavic.distributed.ray_session import ray_session
from lavic.errors import LavicError
from lavic.recommend.retrieval.build import Make
from lavic.recommend.retrieval.fusion import method_weights
from lavic.recommend.retrieval.manifest import FILE, IndexManifest
from lavic.shards.retrieval.index_build import make_index
from lavic.shards.retrieval.inputs import read_inputs
from lavic.shards.retrieval.lists import search
from lavic.shards.retrieval.search_work import Run, run_here
from lavic.shards.retrieval.settings import RetrieveSettings
from lavic.storage.atomic import atomic_write
from lavic.storage.output_folder import lock_output_folder
from lavic.tracking.tracker import Tracker

DESCRIPTION = """Find candidates for conversations in a whole catalogue: by words (bm25), by the meaning of texts
(dense, or endpoint for a server's embeddings), and by the fusion of several lists.

  lavic retrieve --items item2meta_train.json --conversations test.jsonl --out lists.jsonl --index index
  lavic retrieve --items 'meta_*.jsonl.gz' --store store --conversations train.jsonl valid.jsonl test.jsonl \\
      --out lists --index index --methods bm25 dense

The index is made at first use and kept; a stopped command resumes when it is run again. Writes the conversations with
the new list (ids, best first) and its scores, a TREC run for each method, and results.json: recall with intervals. A
target is never added to a list, and items that the conversation has named are left out."""

RESULTS = "results.json"
"""Written last."""

SETTINGS = RetrieveSettings
"""The command's settings, for `lavic.cli.command_module`."""


def resolve(argv: Sequence[str] | None) -> RetrieveSettings:
    """The settings of a command line."""
    chosen = parse(RetrieveSettings, argv, command="retrieve", description=DESCRIPTION)
    method_weights(chosen.methods, chosen.weights)
    return chosen


def is_complete(settings: RetrieveSettings) -> bool:
    """Whether the lists are complete: the results are written last."""
    return (settings.folder / RESULTS).is_file()


def estimate(settings: RetrieveSettings, *, expected: int | None = None) -> str:
    """How large the index gets, as text; where there is none yet, of `expected` items."""
    items = expected
    if (settings.index / FILE).is_file():
        items = IndexManifest.read(settings.index).items
    if items is None:
        return ""
    return f"items: {items:,} in the index, searched by {', '.join(settings.methods)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    chosen = resolve(argv)
    if chosen.uses_ray:
        chosen = chosen.for_workers()
    inputs = read_inputs(chosen)
    started = time.monotonic()
    check_readable(chosen.items)
    with ExitStack() as stack:
        stack.enter_context(lock_output_folder(chosen.folder))
        make, run = _executor(chosen, stack)
        tracker = stack.enter_context(Tracker.open(chosen.folder, chosen.tracking))
        tracker.start("retrieve", flatten(chosen))
        manifest = make_index(chosen, make)
        (chosen.folder / RESULTS).unlink(missing_ok=True)
        with _unchanged(chosen, manifest):
            results = search(chosen, manifest, inputs, run, tracker)
        results["index"] = {
            "items": manifest.items,
            "catalogue": manifest.catalogue,
            "counts": dict(manifest.counts),
            "approximate": {
                name: record.approximate for name, record in manifest.methods.items() if record.approximate
            },
        }
        results["seconds"] = round(time.monotonic() - started, 2)
        atomic_write(chosen.folder / RESULTS, json.dumps(results, indent=2, default=str) + "\n")
        tracker.artifact(chosen.folder / RESULTS)
    return 0


@contextmanager
def _unchanged(chosen: RetrieveSettings, manifest: IndexManifest) -> Iterator[None]:
    """Says so when a search fails because another command has extended the index, which removes files."""
    try:
        yield
    except LavicError:
        if IndexManifest.read(chosen.index) != manifest:
            raise LavicError(
                f"{chosen.index}: another command has changed the index meanwhile: run the same command again"
            ) from None
        raise


def _executor(chosen: RetrieveSettings, stack: ExitStack) -> tuple[Make | None, Run]:
    """What embeds items, and what searches: on Ray, or in this process."""
    if not chosen.uses_ray:
        return None, run_here
    stack.enter_context(ray_session(chosen.ray))
    from lavic.shards.retrieval.ray_work import embed_on_ray, search_on_ray

    return embed_on_ray(chosen), search_on_ray
