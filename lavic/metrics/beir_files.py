"""A test set in the form of BEIR: `corpus.jsonl`, `queries.jsonl` and `qrels/test.tsv` in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lavic.metrics.trec_files import token
from lavic.storage.atomic import atomic_open, to_utf8


def write_beir(
    folder: Path,
    *,
    corpus: Iterable[tuple[str, str, str]],
    queries: Mapping[str, str],
    targets: Mapping[str, Sequence[str]],
) -> None:
    """Writes the three files; the qrels, without which no reader takes the folder, last.

    Args:
        corpus: Id, title and text of each item.
    """
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    with atomic_open(folder / "corpus.jsonl") as file:
        for item, title, text in corpus:
            file.write(_line({"_id": token(item), "title": title, "text": text, "metadata": {}}))
    with atomic_open(folder / "queries.jsonl") as file:
        for query, text in queries.items():
            file.write(_line({"_id": token(query), "text": text, "metadata": {}}))
    with atomic_open(folder / "qrels" / "test.tsv") as file:
        file.write(b"query-id\tcorpus-id\tscore\n")
        for query, items in targets.items():
            for item in dict.fromkeys(items):
                file.write(to_utf8(f"{token(query)}\t{token(item)}\t1\n"))


def _line(value: Mapping[str, object]) -> bytes:
    return to_utf8(json.dumps(value, ensure_ascii=False)) + b"\n"
