"""Baselines that read text: BM25 and a sentence encoder, from the conversation to each candidate's catalogue text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lavic.data.catalog import read_items
from lavic.data.schema import Conversation, Item
from lavic.errors import ConfigError, DataError, LaunchError, first_line
from lavic.evaluation.baselines import by_score
from lavic.evaluation.test_set import TestSet
from lavic.recommend.ranked_list import RankedList

MAX_ITEM_CHARACTERS = 20_000
"""Of an item's text; what is behind is not read."""
CHARACTERS_PER_TOKEN = 4
"""About; a query is shortened to what the encoder reads, from its oldest turns."""


def read_candidate_items(paths: Sequence[str | Path], test_sets: Iterable[TestSet]) -> dict[str, Item]:
    """The catalogue's records of all candidates of the test sets.

    Args:
        paths: Catalogue files, as `read_items` takes them.
        test_sets: Whose candidates are wanted.

    Raises:
        DataError: A file cannot be read, or holds none of the candidates.
    """
    wanted = {item for test_set in test_sets for listed in test_set.lists for item in listed}
    items = {item.id: item for item in read_items(paths) if item.id in wanted}
    if not items:
        names = ", ".join(map(str, paths))
        raise DataError(
            f"{names}: none of the {len(wanted):,} candidates is in the catalogue: name the one they are of"
        )
    return items


def item_text(item: Item) -> str:
    """What the catalogue says about an item: title, categories, features, description."""
    parts = (item.title, *item.categories, *item.features, *item.description)
    return _readable(" ".join(part for part in parts if part))[:MAX_ITEM_CHARACTERS]


def query_text(conversation: Conversation, characters: int | None = None) -> str:
    """The turns of a conversation, without its oldest ones where they are too long.

    Args:
        conversation: The conversation.
        characters: How many to keep at most, the last ones; of a longer last turn its beginning.
    """
    kept: list[str] = []
    left = characters
    for turn in reversed(conversation.turns):
        text = _readable(turn.text)
        if left is not None:
            if kept and len(text) > left:
                break
            text = text[:left]
            left = max(0, left - len(text) - 1)
        kept.append(text)
    return "\n".join(reversed(kept))


def _readable(text: str) -> str:
    """Text without what no encoder takes: halves of surrogate pairs and zero bytes."""
    return text.encode("utf-8", "replace").decode().replace("\0", " ")


def rank_bm25(test_set: TestSet, items: Mapping[str, Item]) -> list[RankedList]:
    """BM25 of the whole conversation and each candidate's text; candidates that share no word with it are tied.

    Word frequencies are those of all candidates of the test set.

    Raises:
        LaunchError: bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise LaunchError("bm25s is not installed: pip install 'lavic[evaluate]'") from None

    def words(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)

    ids = [item for item in _distinct(test_set.lists) if item in items]
    tokens = words([item_text(items[item]) for item in ids])
    filled = [row for row, row_tokens in enumerate(tokens) if row_tokens]
    if not filled:
        return [by_score(listed, {}) for listed in test_set.lists]
    index = bm25s.BM25()
    index.index([tokens[row] for row in filled], show_progress=False)
    place = {ids[row]: number for number, row in enumerate(filled)}
    known = frozenset(token for row in filled for token in tokens[row])

    def scores(conversation: Conversation, listed: Sequence[str]) -> dict[str, float]:
        (query,) = words([query_text(conversation)])
        query = [token for token in query if token in known]
        if not query:
            return {}
        values = index.get_scores(query)
        # An item without text has no word in common either: 0, as one that has others.
        return {item: float(values[place[item]]) if item in place else 0.0 for item in listed}

    return _rank(test_set, scores)


def rank_dense(test_set: TestSet, items: Mapping[str, Item], model: str, *, batch_size: int = 32) -> list[RankedList]:
    """Cosine similarity of the conversation and each candidate's text, by a sentence encoder.

    Args:
        test_set: The lists.
        items: The catalogue's records; candidates without one are tied behind the others.
        model: Folder or Hugging Face name of a sentence-transformers model.
        batch_size: Texts per forward pass.

    Raises:
        ConfigError: The model cannot be loaded.
        LaunchError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise LaunchError("sentence-transformers is not installed: pip install 'lavic[retrieve]'") from None
    try:
        encoder = SentenceTransformer(model)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"--dense-model {model}: cannot be loaded ({first_line(error)})") from None

    def encode(texts: list[str]) -> np.ndarray:
        return np.asarray(
            encoder.encode(texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
        )

    ids = [item for item in _distinct(test_set.lists) if item in items]
    vectors = encode([item_text(items[item]) for item in ids]) if ids else np.zeros((0, 1))
    place = {item: row for row, item in enumerate(ids)}
    limit = CHARACTERS_PER_TOKEN * (encoder.max_seq_length or 512)
    queries = encode([query_text(conversation, limit) for conversation in test_set.conversations])
    rows = iter(queries)

    def scores(_: Conversation, listed: Sequence[str]) -> dict[str, float]:
        query = next(rows)
        return {item: float(vectors[place[item]] @ query) for item in listed if item in place}

    return _rank(test_set, scores)


def _rank(test_set: TestSet, scores: Callable[[Conversation, Sequence[str]], Mapping[str, float]]) -> list[RankedList]:
    pairs = zip(test_set.conversations, test_set.lists, strict=True)
    return [by_score(listed, scores(conversation, listed)) for conversation, listed in pairs]


def _distinct(lists: Iterable[Collection[str]]) -> list[str]:
    return list(dict.fromkeys(item for listed in lists for item in listed))
