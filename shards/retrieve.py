"""`lavic retrieve`: candidate lists from a whole catalogue, for every conversation."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavic.config import flatten, parse
from lavic.data.catalog import check_readable
from lavic.data.conversations import read_conversations, set_names
from lavic.data.index.item_index import ItemIndex
from lavic.data.schema import Conversation
from lavic.data.sources.json_records import json_records
from lavic.distributed.ray_session import ray_session
from lavic.errors import ConfigError, DataError, LavicError
from lavic.metrics.trec_files import write_run
from lavic.recommend.retrieval import Hits, RetrievalIndex, fuse, query_text
from lavic.recommend.retrieval.build import Make, add_methods, as_recorded, out_of_date, prepare_index
from lavic.recommend.retrieval.catalogue import CatalogueRows, files_state
from lavic.recommend.retrieval.hits import method_weights
from lavic.recommend.retrieval.item_table import ItemTable
from lavic.recommend.retrieval.manifest import FILE, PLACES, IndexManifest, identity
from lavic.recommend.retrieval.recall import recall
from lavic.recommend.retrieval.vectors.approximate import searches_as
from lavic.shards.retrieval.methods import builders, recorded_builder
from lavic.shards.retrieval.output import count_targets, falling, recall_table, write_conversations
from lavic.shards.retrieval.search_work import Run, run_here, search_all
from lavic.shards.retrieval.settings import RetrieveSettings
from lavic.storage.atomic import atomic_write
from lavic.storage.file_digest import file_sha256
from lavic.storage.output_folder import lock_output_folder
from lavic.storage.text_files import open_text_file
from lavic.tracking.progress import progress_bar
from lavic.tracking.run_metadata import versions
from lavic.tracking.tracker import Tracker

DESCRIPTION = """Find candidates for conversations in a whole catalogue: by words (bm25), by the meaning of texts
(dense, or endpoint for a server's embeddings), and by the fusion of several lists.

  lavic retrieve --items item2meta_train.json --conversations test.jsonl --out lists.jsonl --index index
  lavic retrieve --items 'meta_*.jsonl.gz' --store store --conversations train.jsonl valid.jsonl test.jsonl \\
      --out lists --index index --methods bm25 dense

The index is made at first use and kept; a stopped command goes on when it is run again. Writes the conversations with
the new list (ids, best first) and its scores, a TREC run for each method, and results.json: recall with intervals. A
target is never added to a list, and items that the conversation has named are left out."""

RESULTS = "results.json"
"""Written last."""
FUSED = "fused"

SETTINGS = RetrieveSettings
"""The command's settings, for `lavic.cli.command_module`."""


def resolve(argv: Sequence[str] | None) -> RetrieveSettings:
    """The settings of a command line."""
    chosen = parse(RetrieveSettings, argv, command="retrieve", description=DESCRIPTION)
    method_weights(chosen.methods, chosen.weights)
    return chosen


def is_complete(settings: RetrieveSettings) -> bool:
    """Whether the lists stand: the results are written last."""
    return (settings.folder / RESULTS).is_file()


def estimate(settings: RetrieveSettings, *, expected: int | None = None) -> str:
    """How large the index gets, as text.

    Args:
        settings: Of the command.
        expected: About how many items there will be, where there is no index yet.
    """
    items = expected
    if (settings.index / FILE).is_file():
        items = IndexManifest.read(settings.index).items
    if items is None:
        return ""
    return f"items: {items:,} in the index, searched by {', '.join(settings.methods)}"


@dataclass(frozen=True, kw_only=True)
class Input:
    """A conversation file."""

    name: str
    path: Path
    out: Path
    """Where it is written with the lists."""
    conversations: list[Conversation]
    rows: list[dict[str, Any]]
    """As they stand in the file."""


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
        results = search(chosen, inputs, run, tracker)
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


def _executor(chosen: RetrieveSettings, stack: ExitStack) -> tuple[Make | None, Run]:
    """What embeds items, and what searches: on Ray, or in this process."""
    if not chosen.uses_ray:
        return None, run_here
    stack.enter_context(ray_session(chosen.ray))
    from lavic.shards.retrieval.ray_work import embed_on_ray, search_on_ray

    return embed_on_ray(chosen), search_on_ray


def read_inputs(chosen: RetrieveSettings) -> list[Input]:
    """The conversation files, and where each is written.

    Raises:
        ConfigError: OUT cannot take them.
        DataError: A file cannot be read.
    """
    paths = [Path(path) for path in chosen.conversations]
    if not paths:
        raise ConfigError("--conversations: name at least one file")
    if chosen.out.suffix in (".json", ".gz", ".zst") and not chosen.out.is_dir():
        raise ConfigError(f"--out {chosen.out}: a file of lists ends in .jsonl; for a folder use another name")
    if chosen.is_file and len(paths) > 1:
        raise ConfigError(f"--out {chosen.out}: a file holds one conversation file, not {len(paths)}: name a folder")
    names = set_names(paths)
    outs = [chosen.out] if chosen.is_file else [chosen.out / f"{name}.jsonl" for name in names]
    if len(set(outs)) < len(outs):
        raise ConfigError(
            "--conversations: two files have the same name, and their folders too: give each its own --out"
        )
    inputs = []
    for name, path, out in zip(names, paths, outs, strict=True):
        if out.exists() and path.exists() and out.samefile(path):
            raise ConfigError(f"--out {out}: is an input too: use another one")
        conversations = read_conversations(path)
        is_json = path.suffix == ".json"
        with open_text_file(str(path)) as file:
            rows = [record.value for record in json_records(str(path), file, None, is_json=is_json, keyed=False)]
        inputs.append(Input(name=name, path=path, out=out, conversations=conversations, rows=rows))
    return inputs


def make_index(chosen: RetrieveSettings, make: Make | None = None) -> IndexManifest:
    """Makes the index, adds what it lacks, or checks that it is the one that is wanted.

    Raises:
        DataError: It is of another catalogue, of other texts or of other settings.
    """
    if chosen.store is not None and not (chosen.store / FILE).is_file():
        raise DataError(f"--store {chosen.store}: not a whole item store (no manifest.json): run `lavic embed` again")
    if (standing := _standing(chosen)) is not None:
        _print_index(chosen.index, standing)
        _check_store(chosen)
        _note_places(chosen, standing)
        return standing
    with lock_output_folder(chosen.index):
        if not chosen.items:
            manifest, before = IndexManifest.read(chosen.index), None
            _check_store(chosen)
        else:
            store = ItemIndex.of_store(chosen.store) if chosen.store else None
            rows = CatalogueRows(chosen.items, chosen.text, store)
            manifest, before = prepare_index(
                chosen.index,
                rows,
                text=flatten(chosen.text),
                extend=chosen.extend,
                files=files_state(chosen.items, chosen.store),
                counts=rows.counts,
            )
        _print_index(chosen.index, manifest)
        others = [
            recorded_builder(name, record, chosen, make)
            for name, record in (before.methods if before is not None else {}).items()
            if name not in chosen.methods
        ]
        return add_methods(
            chosen.index, manifest, builders(chosen, make), before, approximate=chosen.approximate, others=others
        )


def _standing(chosen: RetrieveSettings) -> IndexManifest | None:
    """The index, if nothing is to be added to it: it is read without its lock, by any number of commands."""
    if not (chosen.index / FILE).is_file():
        return None
    manifest = IndexManifest.read(chosen.index)
    same = not chosen.items or (
        manifest.text == as_recorded(flatten(chosen.text))
        and bool(manifest.files)  # a catalogue that is elsewhere is read to tell
        and manifest.files == files_state(chosen.items, chosen.store)
    )
    made = all(
        (record := manifest.methods.get(builder.name)) is not None
        and identity(record.settings) == identity(as_recorded(builder.settings))
        and not out_of_date(record, builder)
        and (record.kind == "bm25" or searches_as(record, chosen.approximate))
        for builder in builders(chosen)
    )
    return manifest if same and made else None


def _note_places(chosen: RetrieveSettings, manifest: IndexManifest) -> None:
    """Records where models lie now that are no longer where they were; not if the index cannot be written now."""
    moved = {
        builder.name: replace(record, settings=as_recorded(builder.settings))
        for builder in builders(chosen)
        if (record := manifest.methods[builder.name]).settings != as_recorded(builder.settings)
        and not all(Path(str(record.settings[name])).exists() for name in PLACES if name in record.settings)
    }
    if moved:
        with suppress(LavicError, OSError), lock_output_folder(chosen.index, timeout_s=0.0):
            replace(manifest, methods={**manifest.methods, **moved}).write(chosen.index)


def _check_store(chosen: RetrieveSettings) -> None:
    """Refuses an index with items that the store does not hold, where there is no catalogue to make another one of.

    Raises:
        DataError: One line.
    """
    manifest = IndexManifest.read(chosen.index)
    if chosen.store is None or chosen.items or (store := ItemIndex.of_store(chosen.store)) is None:
        return
    if all(manifest.files.get(path) == state for path, state in files_state((), chosen.store).items()):
        return  # it was made of this store's items
    table = ItemTable(chosen.index / manifest.table, manifest.catalogue)
    if lacking := sum(id not in store for id in table.ids):
        raise DataError(
            f"--store {chosen.store}: lacks {lacking:,} of the {manifest.items:,} items of the index {chosen.index}: "
            "name the catalogue too (--items) and another --index, or leave --store out"
        )


def _print_index(folder: Path, manifest: IndexManifest) -> None:
    left_out = {reason: count for reason, count in manifest.counts.items() if count and reason != "rows"}
    why = "".join(f"; {reason} {count:,}" for reason, count in left_out.items())
    print(
        f"{folder}: {manifest.items:,} items of {manifest.counts.get('rows', manifest.items):,} rows{why}", flush=True
    )


def search(chosen: RetrieveSettings, inputs: Sequence[Input], run: Run, tracker: Tracker) -> dict[str, Any]:
    """Writes the lists of all conversations; returns what becomes results.json."""
    index = RetrievalIndex.open(chosen.index)
    store = ItemIndex.of_store(chosen.store) if chosen.store else None
    sets: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    total = sum(len(each.conversations) for each in inputs)
    with progress_bar(total, "conversations", "search") as bar:
        for each in inputs:
            tracker.dataset(each.name, file_sha256(each.path), each.path, context="retrieval")
            exclude = [
                frozenset(conversation.context_items) if chosen.exclude_mentioned else frozenset()
                for conversation in each.conversations
            ]
            queries = [query_text(conversation) for conversation in each.conversations]
            lists = search_all(chosen, queries, exclude, parts=chosen.index_parts, run=run, done=bar.update)
            final = _final(lists, chosen)
            write_conversations(each.out, each.rows, final, chosen.key)
            shown = {**lists, **({FUSED: final} if len(lists) > 1 else {})}
            for name, hits in shown.items():
                rows = zip(each.conversations, hits, strict=True)
                write_run(
                    chosen.folder / f"{each.name}.{name}.run",
                    ((conversation.id, list_.ids, falling(list_.scores)) for conversation, list_ in rows),
                    tag=f"lavic-{name}",
                )
            targets = {id for conversation in each.conversations for id in conversation.targets}
            tables[each.name] = recall(
                each.conversations,
                {name: [list_.ids for list_ in hits] for name, hits in shown.items()},
                draws=chosen.draws,
                level=chosen.level,
                seed=chosen.seed,
            )
            counts = count_targets(
                each.conversations,
                {id: id in index for id in targets},
                {id: id in store for id in targets} if store is not None else None,
                exclude,
            )
            counts["empty_lists"] = sum(not hits.ids for hits in final)
            sets[each.name] = _record(each, counts, tables[each.name], tracker)
    print(recall_table(tables))
    for name, values in sets.items():
        print(f"{name}: " + ", ".join(f"{reason} {count:,}" for reason, count in values["counts"].items()))
    print(chosen.out)
    return {"sets": sets, "key": chosen.key, "settings": flatten(chosen), "versions": versions("lavic", "bm25s")}


def _final(lists: Mapping[str, Sequence[Hits]], chosen: RetrieveSettings) -> list[Hits]:
    """The lists that the conversations get: of the one method, or fused."""
    if len(lists) == 1:
        return list(next(iter(lists.values())))
    weights = method_weights(chosen.methods, chosen.weights)
    return [
        fuse(dict(zip(lists, hits, strict=True)), chosen.k, weights=weights)
        for hits in zip(*lists.values(), strict=True)
    ]


def _record(each: Input, counts: Mapping[str, int], table: Mapping[str, Any], tracker: Tracker) -> dict[str, Any]:
    """A file's part of results.json; its numbers go to the journal."""
    methods = {
        method: {name: interval.as_dict() for name, interval in intervals.items()}
        for method, intervals in table.items()
    }
    tracker.log(
        0,
        **{
            f"{each.name}/{method}/{name}": interval["value"]
            for method, intervals in methods.items()
            for name, interval in intervals.items()
        },
    )
    return {"file": str(each.path), "out": str(each.out), "counts": dict(counts), "methods": methods}
