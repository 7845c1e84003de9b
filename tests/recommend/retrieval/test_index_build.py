"""Builds of a retrieval index: other catalogues and settings, extension, stopped builds, damaged files."""

from __future__ import annotations

import numpy as np
import pytest

from lavic.errors import DataError
from lavic.recommend.retrieval import RetrievalIndex
from lavic.recommend.retrieval.bm25.build import Bm25Builder, Bm25Settings
from lavic.recommend.retrieval.build import VectorBuilder, add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row
from lavic.recommend.retrieval.manifest import IndexManifest
from tests.recommend.retrieval.index_data import TEXT, embed, make_index, random_rows, search_all


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


def test_an_index_that_grows_while_it_is_opened_is_opened(tmp_path, monkeypatch):
    rows = random_rows(250)
    smaller = make_index(tmp_path / "index", rows[:150]).manifest
    grown = make_index(tmp_path / "index", rows, extend=True)
    grown_search = search_all(grown)
    manifests = [smaller, grown.manifest]
    monkeypatch.setattr(IndexManifest, "read", lambda folder: manifests.pop(0))
    assert search_all(RetrievalIndex.open(tmp_path / "index")) == grown_search and not manifests


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
