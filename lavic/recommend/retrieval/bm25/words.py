"""The words of a text: in lower case, without stop words, as bm25s takes them by default."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from lavic.storage.index.text_hash import hash_texts

_WORD = re.compile(r"(?u)\b\w\w+\b")


def words_of() -> Callable[[str], list[str]]:
    """A function from a text to its words, in their order."""
    from bm25s.stopwords import STOPWORDS_EN

    stop = frozenset(STOPWORDS_EN)

    def words(text: str) -> list[str]:
        return [word for word in _WORD.findall(text.lower()) if word not in stop]

    return words


def hash_words(words: Iterable[str]) -> np.ndarray:
    """A number for each word, the same in every process: uint64 [n]."""
    return hash_texts(words)[:, 0]
