"""Baselines that count: no help from the order of the list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lavic.data.schema import Conversation, Turn
from lavic.evaluation import text_arms
from lavic.evaluation.baselines import count_targets, list_order, popularity, repeat_last
from lavic.evaluation.test_set import TestSet
from lavic.recommend.retrieval.vectors.sentence_encoder import DenseSettings


def test_popularity_counts_and_leaves_equals_tied():
    counts = count_targets([["c"], ["c", "b"], ["z"]])
    ranked = popularity(["a", "b", "c", "d"], counts)
    assert (ranked.ids, ranked.scores) == (("c", "b", "a", "d"), (2.0, 1.0, 0.0, 0.0))
    assert list_order(["b", "a", "b"]).ids == ("b", "a")


def test_the_last_named_item_comes_first_and_the_rest_is_tied():
    ranked = repeat_last(["a", "b", "c", "d"], ["b", "c", "b", "z"])
    assert (ranked.ids, ranked.scores) == (("b", "c", "a", "d"), (3.0, 2.0, 0.0, 0.0))
    assert set(repeat_last(["a", "b"], []).scores) == {0.0}


class InexactEncoder:
    """Vectors whose last digits depend on what else is embedded, as a model's do."""

    def __init__(self, recorded: object, **options: object) -> None:
        self._rng = np.random.default_rng(0)

    def documents(self, texts: list[str]) -> np.ndarray:
        vectors = np.array([[len(text), 1.0] for text in texts])
        return (vectors + 1e-6 * self._rng.random(vectors.shape)).astype(np.float32)

    queries = documents


def test_items_of_the_same_text_are_tied(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_arms, "SentenceEncoder", InexactEncoder)
    monkeypatch.setattr(text_arms, "dense_settings", lambda dense: {})
    conversation = Conversation(id="t-0", turns=(Turn("seeker", "a mug"),), targets=("a",))
    test_set = TestSet(
        name="t", file=Path("t.jsonl"), sha256="", conversations=(conversation,), lists=(("a", "b", "c", "d"),)
    )
    texts = {"a": "a red mug", "b": "a hat", "c": "a red mug", "d": "a red mug"}
    (ranking,) = text_arms.rank_dense(test_set, texts, DenseSettings())
    scores = dict(zip(ranking.ids, ranking.scores, strict=True))
    assert scores["a"] == scores["c"] == scores["d"] != scores["b"]
