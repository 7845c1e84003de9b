"""Search in a retrieval index: scores, ties, shards, excluded items, invalid queries."""

from __future__ import annotations

import multiprocessing
import pickle

import bm25s
import numpy as np
import pytest

from lavic.errors import ConfigError, DataError
from lavic.recommend.retrieval import Hits, RetrievalIndex, fuse
from lavic.recommend.retrieval.build import VectorBuilder, add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row
from tests.recommend.retrieval.index_data import TEXT, embed, make_index, random_rows, search_all


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> RetrievalIndex:
    return make_index(tmp_path_factory.mktemp("index") / "index", random_rows(500))


def test_bm25_scores_equal_bm25s(index):
    rows = list(index.table.rows())
    bare = bm25s.BM25()
    bare.index(bm25s.tokenize([row.text for row in rows], show_progress=False), show_progress=False)
    for query in ("red shirt", "black black lamp", "wool"):
        scores = bare.get_scores(bm25s.tokenize([query], return_ids=False, show_progress=False)[0])
        (hits,) = index.search([query], 500, methods=["bm25"])["bm25"]
        expected = {row.id: score for row, score in zip(rows, scores.tolist(), strict=True) if score > 0}
        assert dict(zip(hits.ids, hits.scores, strict=True)) == pytest.approx(expected, rel=1e-5)
        assert hits.scores == sorted(hits.scores, reverse=True)


def test_vectors_are_compared_by_their_cosine(index):
    rows = list(index.table.rows())
    vectors = embed([row.text for row in rows])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = embed(["red shirt", "glass cup"])
    for query, hits in zip(queries, index.search_vectors("meaning", queries, 30), strict=True):
        scores = np.round(vectors @ query / np.linalg.norm(query), 5)
        expected = sorted(zip((-scores).tolist(), [row.id for row in rows], strict=True))[:30]
        assert np.allclose(hits.scores, [-score for score, _ in expected], atol=2e-5)
        assert hits.scores == sorted(hits.scores, reverse=True)


def test_ties_are_ordered_by_id(tmp_path):
    rows = [Row(id, "red shirt") for id in ("m", "c", "x", "a", "k")] + [Row("z", "lamp")]
    index = make_index(tmp_path / "index", rows, part_rows=2, chunk_rows=2)
    assert index.search(["shirt"], 3, methods=["bm25"])["bm25"][0].ids == ["a", "c", "k"]
    assert index.search_vectors("meaning", embed(["red shirt"]), 4)[0].ids == ["a", "c", "k", "m"]


@pytest.mark.parametrize("query", ["", "   ", "the of and", "?!", "zzzz"])
def test_a_query_without_a_known_word_finds_nothing(index, query):
    assert index.search([query], 10, methods=["bm25"])["bm25"] == [Hits()]


def test_bm25_lists_are_not_padded(tmp_path):
    index = make_index(tmp_path / "index", [Row("a", "red"), Row("b", "lamp"), Row("c", "red lamp")])
    assert index.search(["red"], 5, methods=["bm25"])["bm25"][0].ids == ["a", "c"]
    hits = index.search_vectors("meaning", embed(["red"]), 5)[0]
    assert sorted(hits.ids) == ["a", "b", "c"]


def test_items_without_text_are_not_found(tmp_path):
    index = make_index(tmp_path / "index", [Row("a", "red"), Row("b", ""), Row("c", " ")])
    assert index.search_vectors("meaning", embed(["red"]), 5)[0].ids == ["a"]
    only = make_index(tmp_path / "empty", [Row("b", "")])
    assert only.search(["red"], 5, methods=["bm25"])["bm25"] == [Hits()]


def test_results_do_not_depend_on_parts_or_row_order(index, tmp_path):
    rows = random_rows(500)
    expected = search_all(index)
    assert search_all(make_index(tmp_path / "parts", rows, part_rows=7, chunk_rows=3)) == expected
    assert search_all(make_index(tmp_path / "sorted", sorted(rows, key=lambda row: row.id), part_rows=90)) == expected


def test_results_do_not_depend_on_other_queries(index):
    vectors = np.random.default_rng(0).normal(size=(70, 16))
    together = index.search_vectors("meaning", vectors, 10)
    assert [index.search_vectors("meaning", vector[None], 10)[0] for vector in vectors] == together


@pytest.mark.parametrize("count", [2, 5, 9])
def test_results_do_not_depend_on_shards(tmp_path, count):
    index = make_index(tmp_path / "index", random_rows(300), part_rows=60, chunk_rows=40)
    queries, vectors = ["red shirt", "the lamp", ""], embed(["red shirt", "glass cup"])
    shards = [RetrievalIndex.open(index.folder, shard=(number, count)) for number in range(count)]
    for method, method_queries in (("bm25", queries), ("meaning", vectors)):
        expected = index.hits(index.search_rows(method, method_queries, [7] * len(method_queries)), 7)
        parts = [shard.search_rows(method, method_queries, [7] * len(method_queries)) for shard in shards]
        merged = [index.merge(shard_rows, 7) for shard_rows in zip(*parts, strict=True)]
        assert index.hits(merged, 7) == expected


def test_excluded_items_are_replaced_by_the_next(index):
    (full,) = index.search(["red shirt"], 12, methods=["bm25"])["bm25"]
    (hits,) = index.search(["red shirt"], 10, methods=["bm25"], exclude=[set(full.ids[:2])])["bm25"]
    assert hits.ids == full.ids[2:]
    vectors = embed(["red shirt"])
    (full,) = index.search_vectors("meaning", vectors, 12)
    (hits,) = index.search_vectors("meaning", vectors, 10, exclude=[{full.ids[0], full.ids[5], "absent"}])
    assert hits.ids == [id for id in full.ids if id not in (full.ids[0], full.ids[5])]


def test_given_items_are_scored_as_in_a_search(index):
    (hits,) = index.search(["black black lamp"], 50, methods=["bm25"])["bm25"]
    ids = [*hits.ids[::-1], "absent"]
    assert index.score("bm25", "black black lamp", ids) == [*hits.scores[::-1], 0.0]
    vectors = embed(["red shirt"])
    (hits,) = index.search_vectors("meaning", vectors, 50)
    assert index.score_vector("meaning", vectors[0], [*hits.ids, "absent"]) == [*hits.scores, -1.0]


def test_invalid_queries_are_refused(index):
    with pytest.raises(DataError, match="vector 1 has values that are not finite"):
        index.search_vectors("meaning", np.array([[1.0] * 16, [np.nan] * 16]), 3)
    with pytest.raises(DataError, match="vectors of 16 numbers"):
        index.search_vectors("meaning", np.ones((1, 3)), 3)
    assert index.search_vectors("meaning", np.zeros((1, 16)), 3) == [Hits()]
    with pytest.raises(ConfigError, match="no method `dense`, only bm25, meaning"):
        index.search(["red"], 3, methods=["dense"])
    for arguments in ({"queries": "red"}, {"queries": ["red"], "methods": "bm25"}):
        with pytest.raises(ConfigError, match="queries and methods are lists of texts"):
            index.search(**arguments, k=3)
    with pytest.raises(ConfigError, match="queries are a list of texts"):
        index.encode("meaning", "red")


def test_item_vectors_that_are_not_finite_are_refused(tmp_path):
    builder = VectorBuilder("meaning", {}, lambda: lambda texts: np.full((len(texts), 4), np.nan))
    manifest, _ = prepare_index(tmp_path, lambda: [Row("a", "red")], text=TEXT)
    with pytest.raises(DataError, match="vector 0 has values that are not finite"):
        add_methods(tmp_path, manifest, [builder])


def test_a_method_without_any_vector_finds_nothing(tmp_path):
    index = make_index(tmp_path, [Row(f"B{n}", "") for n in range(5)])

    class Encoder:
        queries = staticmethod(embed)

    index.set_encoder("meaning", Encoder())
    (hits,) = index.search(["a lamp"], 3, methods=["meaning"])["meaning"]
    assert not hits.ids


def _search(index):
    return index.search_vectors("meaning", embed(["red shirt", "glass cup"]), 20)


@pytest.mark.slow
def test_processes_share_an_index(index):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_search, [index] * 4) == [_search(index)] * 4


def test_an_index_is_pickled_as_its_folder(index):
    assert len(pickle.dumps(index)) < 4000
    assert search_all(pickle.loads(pickle.dumps(index))) == search_all(index)


def test_fusion_by_reciprocal_rank():
    lists = {"one": Hits(["X", "a", "Y"], [3.0, 2.0, 1.0]), "two": Hits(["b", "c", "Y"], [3.0, 2.0, 1.0])}
    fused = fuse(lists, 10)
    assert fused.ids == ["Y", "X", "b", "a", "c"]
    assert fused.scores == pytest.approx([2 / 63, 1 / 61, 1 / 61, 1 / 62, 1 / 62])
    assert fuse(dict(reversed(lists.items())), 10) == fused
    assert fuse(lists, 2).ids == ["Y", "X"]
    assert fuse(lists, 10, weights={"two": 2.0}).ids == ["Y", "b", "c", "X", "a"]
    assert fuse({}, 3) == Hits()
    assert fuse({"one": Hits(["a", "a", "b"], [1.0, 1.0, 0.5])}, 3).scores == pytest.approx([1 / 61, 1 / 62])
