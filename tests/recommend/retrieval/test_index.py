"""A retrieval index: search results, refused input, extension, damage."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import bm25s
import numpy as np
import pytest

from lavic.errors import ConfigError, DataError
from lavic.recommend.retrieval import Hits, RetrievalIndex, fuse
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


def test_the_first_row_of_an_id_is_used(tmp_path):
    index = make_index(tmp_path / "index", [Row("a", "red"), Row("b", "red"), Row("a", "lamp"), Row("a", "lamp")])
    assert index.manifest.counts == {"rows": 4, "repeated": 2}
    assert len(index) == 2
    assert "a" in index
    assert "c" not in index
    assert not index.search(["lamp"], 3, methods=["bm25"])["bm25"][0].ids


def test_a_catalogue_in_another_order_is_the_same_catalogue(tmp_path):
    rows = random_rows(300)
    before = search_all(make_index(tmp_path, rows, chunk_rows=100))
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert search_all(make_index(tmp_path, rows[::-1], chunk_rows=100)) == before
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == files


@pytest.mark.parametrize("damage", ["removed", "cut short"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    rows = random_rows(300)
    index = make_index(tmp_path, rows, chunk_rows=100)
    before, names = search_all(index), index.manifest.file_names()
    for name in sorted(names - {"manifest.json"}):
        if damage == "removed":
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-10])
        index = make_index(tmp_path, rows, chunk_rows=100)
        assert search_all(index) == before, name
        assert index.manifest.file_names() == {path.name for path in tmp_path.iterdir()} == names


def test_a_lost_table_is_made_again_from_a_catalogue_in_another_order(tmp_path):
    rows = random_rows(300)
    index = make_index(tmp_path, rows, chunk_rows=100)
    before = search_all(index)
    (tmp_path / index.manifest.table).unlink()
    with pytest.raises(DataError, match="missing or damaged, and the catalogue is another one now"):
        make_index(tmp_path, rows[1:], chunk_rows=100)
    manifest, smaller = prepare_index(tmp_path, lambda: rows[::-1], text=TEXT)
    with pytest.raises(DataError, match="the index has `meaning` too"):
        add_methods(tmp_path, manifest, [Bm25Builder(Bm25Settings())], smaller)
    index = make_index(tmp_path, rows[::-1], chunk_rows=100)
    assert search_all(index) == before
    assert index.manifest.file_names() == {path.name for path in tmp_path.iterdir()}


def test_another_catalogue_is_refused(tmp_path):
    rows = random_rows(20)
    make_index(tmp_path / "index", rows)
    before = sorted(path.name for path in (tmp_path / "index").iterdir())
    with pytest.raises(DataError, match="another catalogue \\(20 items, now 19"):
        make_index(tmp_path / "index", rows[1:])
    with pytest.raises(DataError, match="another catalogue"):
        make_index(tmp_path / "index", [Row(rows[0].id, "other"), *rows[1:]])
    with pytest.raises(DataError, match="other texts"):
        prepare_index(tmp_path / "index", lambda: rows, text={"fields": ["title", "features"]})
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == before


def test_other_settings_are_refused(tmp_path):
    make_index(tmp_path / "index", random_rows(20))
    manifest, _ = prepare_index(tmp_path / "index", lambda: random_rows(20), text=TEXT)
    with pytest.raises(DataError, match=r"`bm25` was made with other settings \(k1 was 1.5, is 2.0\)"):
        add_methods(tmp_path / "index", manifest, [Bm25Builder(Bm25Settings(k1=2.0))])


def test_an_extended_index_equals_a_new_one(tmp_path):
    rows = random_rows(500)
    old = make_index(tmp_path / "grown", rows[:310], chunk_rows=100)
    before = search_all(old)
    grown = make_index(tmp_path / "grown", rows[::-1], extend=True, chunk_rows=100)
    assert search_all(old) == before, "an open index does not change"
    assert search_all(grown) == search_all(make_index(tmp_path / "new", rows, chunk_rows=100))
    assert grown.manifest.file_names() == {path.name for path in (tmp_path / "grown").iterdir()}
    with pytest.raises(DataError, match="1 of the index are gone"):
        make_index(tmp_path / "grown", rows[1:], extend=True)


def test_extending_embeds_only_new_items(tmp_path):
    rows = random_rows(250)
    make_index(tmp_path / "index", rows[:150])
    embedded: list[str] = []

    def record_texts(texts):
        embedded.extend(texts)
        return embed(texts)

    manifest, before = prepare_index(tmp_path / "index", lambda: rows, text=TEXT, extend=True)
    methods = [
        Bm25Builder(Bm25Settings()),
        VectorBuilder("meaning", {"model": "test"}, lambda: record_texts, chunk_rows=100),
    ]
    add_methods(tmp_path / "index", manifest, methods, before)
    assert set(embedded) == {row.text for row in rows[150:]}


def test_a_method_without_any_vector_finds_nothing(tmp_path):
    index = make_index(tmp_path, [Row(f"B{n}", "") for n in range(5)])

    class Encoder:
        queries = staticmethod(embed)

    index.set_encoder("meaning", Encoder())
    (hits,) = index.search(["a lamp"], 3, methods=["meaning"])["meaning"]
    assert not hits.ids


def test_vectors_of_another_width_are_refused(tmp_path):
    def wide(texts):
        return np.ones((len(texts), 77))

    rows = random_rows(50)
    make_index(tmp_path, rows[:30])
    before = {path.name for path in tmp_path.iterdir()}
    manifest, smaller = prepare_index(tmp_path, lambda: rows, text=TEXT, extend=True)
    methods = [Bm25Builder(Bm25Settings()), VectorBuilder("meaning", {"model": "test"}, lambda: wide)]
    with pytest.raises(DataError, match="vectors of 77 numbers, and the index has vectors of"):
        add_methods(tmp_path, manifest, methods, smaller)
    index = RetrievalIndex.open(tmp_path)
    assert len(index) == 30 and index.manifest.file_names() == before

    class Wide:
        queries = staticmethod(wide)

    index.set_encoder("meaning", Wide())
    with pytest.raises(DataError, match="use the model that the index was made with"):
        index.search(["lamp"], 3, methods=["meaning"])


def test_another_method_keeps_the_files_of_a_stopped_build(tmp_path):
    def stop(texts):
        if embedded:
            raise KeyboardInterrupt
        embedded.extend(texts)
        return embed(texts)

    embedded: list[str] = []
    rows = random_rows(100)
    manifest, _ = prepare_index(tmp_path, lambda: rows, text=TEXT)
    with pytest.raises(KeyboardInterrupt):
        add_methods(tmp_path, manifest, [VectorBuilder("meaning", {}, lambda: stop, chunk_rows=60)])
    chunks = {path.name for path in tmp_path.glob("meaning-*")}
    manifest = add_methods(tmp_path, manifest, [Bm25Builder(Bm25Settings())])
    assert {path.name for path in tmp_path.glob("meaning-*")} == chunks != set()
    again: list[str] = []
    builder = VectorBuilder("meaning", {}, lambda: lambda texts: again.extend(texts) or embed(texts), chunk_rows=60)
    manifest = add_methods(tmp_path, manifest, [builder])
    assert len(again) <= 40
    assert manifest.file_names() == {path.name for path in tmp_path.iterdir()}


def test_a_damaged_file_of_another_method_is_not_needed(tmp_path):
    index = make_index(tmp_path, random_rows(30))
    (file,) = index.manifest.methods["meaning"].files
    (tmp_path / file.name).unlink()
    index = RetrievalIndex(tmp_path, index.manifest, methods=["bm25"])
    assert index.methods == ("bm25",)
    assert index.search(["lamp"], 3).keys() == {"bm25"}


def test_a_damaged_index_is_refused_in_one_line(tmp_path):
    index = make_index(tmp_path / "index", random_rows(300))
    for name in sorted(index.manifest.file_names()):
        path = tmp_path / "index" / name
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(DataError) as error:
            RetrievalIndex.open(tmp_path / "index")
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        path.unlink()
        with pytest.raises(DataError):
            RetrievalIndex.open(tmp_path / "index")
        path.write_bytes(data)
    with pytest.raises(DataError, match="no retrieval index here"):
        RetrievalIndex.open(tmp_path / "absent")


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
