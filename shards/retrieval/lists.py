"""The lists of all conversations: searched, fused, written, and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lavic.config import flatten
from lavic.data.conversations import file_stem
from lavic.data.index.item_index import ItemIndex
from lavic.metrics.trec_files import write_run
from lavic.recommend.retrieval import Hits, RetrievalIndex, fuse, query_text
from lavic.recommend.retrieval.fusion import method_weights
from lavic.recommend.retrieval.manifest import IndexManifest
from lavic.recommend.retrieval.recall import CUTS, recall
from lavic.shards.retrieval.inputs import Input
from lavic.shards.retrieval.output import count_targets, falling, recall_table, write_conversations
from lavic.shards.retrieval.search_work import Run, search_all
from lavic.shards.retrieval.settings import MethodName, RetrieveSettings
from lavic.tracking.progress import progress_bar
from lavic.tracking.run_metadata import versions
from lavic.tracking.tracker import Tracker

FUSED = "fused"


def search(
    chosen: RetrieveSettings, manifest: IndexManifest, inputs: Sequence[Input], run: Run, tracker: Tracker
) -> dict[str, Any]:
    """Writes the lists of all conversations; returns what becomes results.json."""
    index = RetrievalIndex(chosen.index, manifest, methods=())
    store = ItemIndex.of_store(chosen.store) if chosen.store else None
    sets: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    total = sum(len(file.conversations) for file in inputs)
    with progress_bar(total, "conversations", "search") as bar:
        for file in inputs:
            tracker.dataset(file.name, file.sha256, file.path, context="retrieval")
            exclude = [
                frozenset(conversation.context_items) if chosen.exclude_mentioned else frozenset()
                for conversation in file.conversations
            ]
            queries = [query_text(conversation) for conversation in file.conversations]
            lists = search_all(chosen, manifest, queries, exclude, parts=chosen.index_parts, run=run, done=bar.update)
            final = _final(lists, chosen)
            write_conversations(file.out, file.rows, final, chosen.key)
            ranked = {**lists, **({FUSED: final} if len(lists) > 1 else {})}
            for name in {*get_args(MethodName), FUSED}.difference(ranked):  # of an earlier command
                (chosen.folder / f"{file.name}.{name}.run").unlink(missing_ok=True)
            # The ids that `lavic evaluate` gives the rows of the written file.
            ids = [f"{file_stem(file.out)}-{conversation.row}" for conversation in file.conversations]
            for name, hits in ranked.items():
                write_run(
                    chosen.folder / f"{file.name}.{name}.run",
                    ((id, list_.ids, falling(list_.scores)) for id, list_ in zip(ids, hits, strict=True)),
                    tag=f"lavic-{name}",
                )
            targets = {id for conversation in file.conversations for id in conversation.targets}
            tables[file.name] = recall(
                file.conversations,
                {name: [list_.ids for list_ in hits] for name, hits in ranked.items()},
                draws=chosen.draws,
                level=chosen.level,
                seed=chosen.seed,
                cuts=tuple(cutoff for cutoff in CUTS if cutoff <= chosen.k),
            )
            counts = count_targets(
                file.conversations,
                {id: id in index for id in targets},
                {id: id in store for id in targets} if store is not None else None,
                exclude,
            )
            counts["empty_lists"] = sum(not hits.ids for hits in final)
            sets[file.name] = _record(file, counts, tables[file.name], tracker)
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


def _record(file: Input, counts: Mapping[str, int], table: Mapping[str, Any], tracker: Tracker) -> dict[str, Any]:
    """A file's part of results.json; its numbers go to the journal."""
    methods = {
        method: {name: interval.as_dict() for name, interval in intervals.items()}
        for method, intervals in table.items()
    }
    tracker.log(
        0,
        **{
            f"{file.name}/{method}/{name}": interval["value"]
            for method, intervals in methods.items()
            for name, interval in intervals.items()
        },
    )
    return {"file": file.path, "out": str(file.out), "counts": dict(counts), "methods": methods}
