"""Baselines that read text: BM25 and a sentence encoder, from the conversation to each candidate's catalogue text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lavic.data.catalog import read_items
from lavic.errors import DataError, LaunchError
from lavic.evaluation.baselines import by_score
from lavic.evaluation.test_set import TestSet
from lavic.recommend.ranking.ranked_list import RankedList
from lavic.recommend.retrieval.bm25.words import words_of
from lavic.recommend.retrieval.catalog_rows import Field, item_text
from lavic.recommend.retrieval.query import plain, query_text
from lavic.recommend.retrieval.vectors.sentence_encoder import DenseSettings, SentenceEncoder, dense_settings


def read_candidate_texts(
    paths: Sequence[str | Path], test_sets: Iterable[TestSet], fields: Sequence[Field]
) -> dict[str, str]:
    """The catalogue's texts of the candidates of test sets; a candidate without text is not in it.

    Args:
        paths: Catalogue files, as `read_items` takes them.
        test_sets: Whose candidates are wanted.
        fields: What a text is made of (see `item_text`).

    Raises:
        DataError: A file cannot be read, or has the text of no candidate.
    """
    candidates = {item for test_set in test_sets for item in test_set.items}
    texts = {item.id: _readable(item_text(item, fields)) for item in read_items(paths) if item.id in candidates}
    texts = {item: text for item, text in texts.items() if text.strip()}
    if not texts:
        names = ", ".join(map(str, paths))
        raise DataError(
            f"{names}: the text of none of the {len(candidates):,} candidates is in it: name another catalogue"
        )
    return texts


def _readable(text: str) -> str:
    """Text without halves of surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def rank_bm25(test_set: TestSet, texts: Mapping[str, str]) -> list[RankedList]:
    """BM25 of the conversation and each candidate's text; candidates that share no word with it are tied.

    Word frequencies are those of all candidates of the test set.

    Args:
        test_set: The lists.
        texts: By item. A candidate without one is tied with those that share no word with the conversation.

    Raises:
        LaunchError: bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise LaunchError("bm25s is not installed: pip install 'lavic[evaluate]'") from None
    split_words = words_of()
    documents = {item: split_words(texts[item]) for item in test_set.items if item in texts}
    documents = {item: document for item, document in documents.items() if document}
    if not documents:
        return [by_score(candidates, {}) for candidates in test_set.lists]
    index = bm25s.BM25()
    index.index(list(documents.values()), show_progress=False)
    row_of_item = {item: row for row, item in enumerate(documents)}
    known = frozenset(word for document in documents.values() for word in document)

    def scores(row: int) -> dict[str, float]:
        query = [word for word in split_words(plain(query_text(test_set.conversations[row]))) if word in known]
        values = index.get_scores(query) if query else np.zeros(len(row_of_item))
        return {item: float(values[row_of_item[item]]) if item in row_of_item else 0.0 for item in test_set.lists[row]}

    return [by_score(candidates, scores(row)) for row, candidates in enumerate(test_set.lists)]


def rank_dense(test_set: TestSet, texts: Mapping[str, str], dense: DenseSettings) -> list[RankedList]:
    """Cosine similarity of the conversation and each candidate's text, by a sentence encoder.

    Args:
        texts: By item. Candidates without one are tied behind the others.

    Raises:
        ConfigError: The model cannot be loaded.
        LaunchError: sentence-transformers is not installed.
    """
    ids = [item for item in test_set.items if item in texts]
    if not ids:
        return [by_score(candidates, {}) for candidates in test_set.lists]
    encoder = SentenceEncoder(dense_settings(dense), batch_size=dense.batch_size)
    # Each text once, so that items of the same text are tied: a model's last digits depend on the batch.
    distinct = list(dict.fromkeys(texts[item] for item in ids))
    vectors = _unit(encoder.documents(distinct))
    queries = _unit(encoder.queries([_readable(query_text(conversation)) for conversation in test_set.conversations]))
    row_of_text = {text: row for row, text in enumerate(distinct)}
    row_of_item = {item: row_of_text[texts[item]] for item in ids}
    return [
        by_score(
            candidates, {item: float(vectors[row_of_item[item]] @ query) for item in candidates if item in row_of_item}
        )
        for candidates, query in zip(test_set.lists, queries, strict=True)
    ]


def _unit(vectors: np.ndarray) -> np.ndarray:
    """[n, d] rows of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
