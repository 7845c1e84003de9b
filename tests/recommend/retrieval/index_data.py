"""Rows, a model and an index for the tests of retrieval."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lavic.recommend.retrieval import RetrievalIndex
from lavic.recommend.retrieval.bm25.build import Bm25Builder, Bm25Settings
from lavic.recommend.retrieval.build import VectorBuilder, add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row

WORDS = ["lamp", "shirt", "red", "black", "desk", "wool", "soft", "chair", "green", "mask", "glass", "cup"]
TEXT = {"fields": ["title"]}


def random_rows(count: int, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [Row(f"B{n:05d}", " ".join(rng.choice(WORDS, rng.integers(1, 6)))) for n in rng.permutation(count)]


def embed(texts):
    """A model for tests: a vector of word counts plus noise by the length of the text."""
    return np.array([np.random.default_rng(len(text)).normal(0, 0.1, 16) + count(text) for text in texts])


def count(text):
    return np.array([text.split().count(word) for word in WORDS] + [0.0] * 4)


def builders(part_rows=1 << 20, chunk_rows=100):
    return [
        Bm25Builder(Bm25Settings(part_rows=part_rows)),
        VectorBuilder("meaning", {"model": "test"}, lambda: embed, chunk_rows=chunk_rows),
    ]


def make_index(folder: Path, rows, *, extend=False, **sizes) -> RetrievalIndex:
    folder.mkdir(exist_ok=True)
    manifest, before = prepare_index(folder, lambda: rows, text=TEXT, extend=extend)
    add_methods(folder, manifest, builders(**sizes), before)
    return RetrievalIndex.open(folder)


def search_all(index: RetrievalIndex, k: int = 20):
    vectors = embed(["red shirt", "black desk lamp", "glass cup"])
    bm25_hits = index.search(["red shirt", "the black black lamp on the desk", "glass"], k, methods=["bm25"])["bm25"]
    return bm25_hits, index.search_vectors("meaning", vectors, k)
