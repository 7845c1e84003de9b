"""An evaluation in the forms that other programs read: TREC runs and qrels, and BEIR's folder.

OUT/trec/<set>/   qrels and <arm>.run, for trec_eval, ir-measures, ranx
OUT/beir/<set>/   corpus.jsonl, queries.jsonl, qrels/test.tsv

A folder for each set: joined names of a set `a-b` and its arm `c` would be those of `a` and `b-c`. Both folders are
made anew, so that they hold no arm of an earlier evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lavic.evaluation.predictions import prediction
from lavic.evaluation.test_set import TestSet
from lavic.metrics.beir_files import write_beir
from lavic.metrics.trec_files import write_qrels, write_run
from lavic.recommend.ranking.ranked_list import RankedList
from lavic.recommend.retrieval.query import plain, query_text
from lavic.storage.atomic import atomic_folder


def write_exchange_files(
    out: Path,
    test_sets: Sequence[TestSet],
    rankings: Mapping[str, Mapping[str, Sequence[RankedList | None]]],
    *,
    title: Callable[[str], str],
    text: Callable[[str], str],
) -> None:
    """Writes the files of every test set.

    Args:
        out: The evaluation's folder.
        test_sets: The conversations; their ids are the queries.
        rankings: Test set -> arm -> a ranking of each conversation; one that is None is not in the run.
        title: Item -> its title, or empty.
        text: Item -> its text, or empty.
    """
    out.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out / "trec") as trec, atomic_folder(out / "beir") as beir:
        for test_set in test_sets:
            ids = [conversation.id for conversation in test_set.conversations]
            targets = {conversation.id: conversation.targets for conversation in test_set.conversations}
            folder = trec / test_set.name
            folder.mkdir()
            write_qrels(folder / "qrels", targets.items())
            for arm, ranked in rankings[test_set.name].items():
                rows = [
                    (id, row.ranking, row.scores)
                    for id, ranking in zip(ids, ranked, strict=True)
                    if ranking is not None
                    for row in [prediction((), (), ranking)]
                ]
                write_run(folder / f"{arm}.run", rows, tag=arm)
            listed_items = [item for candidates in test_set.lists for item in candidates]
            items = dict.fromkeys([*listed_items, *(item for group in targets.values() for item in group)])
            write_beir(
                beir / test_set.name,
                corpus=((item, title(item), text(item)) for item in items),
                queries={c.id: plain(query_text(c)) for c in test_set.conversations},
                targets=targets,
            )
