"""Approximate search: recall against exact search, missing vectors, shards, damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lavic.errors import ConfigError, DataError
from lavic.recommend.retrieval import RetrievalIndex
from lavic.recommend.retrieval.build import VectorBuilder, add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row
from lavic.recommend.retrieval.vectors.approximate import ApproximateSettings

pytest.importorskip("faiss")
COUNT, WIDTH = 3000, 24


def clustered_vectors(count: int, seed: int) -> np.ndarray:
    centres = np.random.default_rng(9).normal(size=(60, WIDTH))
    rng = np.random.default_rng(seed)
    return centres[rng.integers(0, 60, count)] + 0.6 * rng.normal(size=(count, WIDTH))


def make_index(folder: Path, approximate: ApproximateSettings, count: int = COUNT) -> RetrievalIndex:
    vectors = clustered_vectors(count, 0)
    rows = [Row(f"B{n:05d}", f"{n}") for n in range(count)]
    folder.mkdir(exist_ok=True)
    manifest, before = prepare_index(folder, lambda: rows, text={})
    builder = VectorBuilder("meaning", {}, lambda: lambda texts: vectors[[int(t) for t in texts]], chunk_rows=700)
    add_methods(folder, manifest, [builder], before, approximate=approximate)
    return RetrievalIndex.open(folder)


@pytest.mark.parametrize(("name", "part_rows"), [("auto", 1 << 20), ("auto", 1100), ("HNSW16", 1 << 20)])
def test_recall_matches_the_manifest(tmp_path, name, part_rows):
    index = make_index(tmp_path, ApproximateSettings(index=name, k=20, part_rows=part_rows))
    approximate = index.manifest.methods["meaning"].approximate
    assert approximate["recall"] >= 0.95
    assert len(approximate["files"]) == -(-COUNT // part_rows)
    queries = clustered_vectors(200, 5)
    exact = index.search_vectors("meaning", queries, 20, exact=True)
    approximate_hits = index.search_vectors("meaning", queries, 20)
    scores = {(n, id): score for n, hits in enumerate(exact) for id, score in zip(hits.ids, hits.scores, strict=True)}
    shared = [(n, id) for n, hits in enumerate(approximate_hits) for id in hits.ids if (n, id) in scores]
    assert len(shared) / len(scores) >= 0.9
    for n, hits in enumerate(approximate_hits):
        assert len(hits) == 20
        assert hits.scores == sorted(hits.scores, reverse=True)
        assert all(scores.get((n, id), s) == s for id, s in zip(hits.ids, hits.scores, strict=True)), "exact scores"


@pytest.mark.parametrize("k", [100, 500, 2900])
def test_lists_longer_than_those_that_were_measured_are_full(tmp_path, k):
    index = make_index(tmp_path, ApproximateSettings(index="auto", k=20))
    queries = clustered_vectors(50, 5)
    exact = index.search_vectors("meaning", queries, k, exact=True)
    approximate_hits = index.search_vectors("meaning", queries, k)
    assert [len(hits) for hits in approximate_hits] == [k] * 50
    shared = sum(len(set(a.ids) & set(b.ids)) for a, b in zip(exact, approximate_hits, strict=True))
    assert shared / (50 * k) >= 0.9


def test_a_list_does_not_depend_on_the_other_queries(tmp_path):
    index = make_index(tmp_path, ApproximateSettings(index="auto", k=10, recall=0.5))
    queries = clustered_vectors(3, 5)
    together = index.search_rows("meaning", queries, [8, 60, 14])
    alone = [index.search_rows("meaning", queries[n : n + 1], [k])[0] for n, k in enumerate((8, 60, 14))]
    assert [rows.tolist() for rows, _ in together] == [rows.tolist() for rows, _ in alone]


def test_a_few_items_are_all_found_once(tmp_path):
    index = make_index(tmp_path, ApproximateSettings(index="auto"), count=3)
    (hits,) = index.search_vectors("meaning", clustered_vectors(1, 1), 10)
    assert sorted(hits.ids) == ["B00000", "B00001", "B00002"]


def test_items_without_a_vector_are_not_proposed(tmp_path):
    rows = [Row(f"B{n}", "text" if n % 2 else "") for n in range(200)]
    manifest, _ = prepare_index(tmp_path, lambda: rows, text={})
    builder = VectorBuilder("meaning", {}, lambda: lambda texts: np.ones((len(texts), 8)))
    add_methods(tmp_path, manifest, [builder], approximate=ApproximateSettings(index="IVF2,Flat"))
    (hits,) = RetrievalIndex.open(tmp_path).search_vectors("meaning", -np.ones((1, 8)), 150)
    assert hits.ids == sorted(row.id for row in rows if row.text)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_shards_of_items_without_a_vector_equal_the_index(tmp_path, parts):
    rows = [Row(f"B{n:02d}", f"{n}" if n % 2 else "") for n in range(12)]
    manifest, _ = prepare_index(tmp_path, lambda: rows, text={})
    vectors = np.random.default_rng(0).normal(size=(12, 8))
    builder = VectorBuilder("meaning", {}, lambda: lambda texts: vectors[[int(t) for t in texts]], chunk_rows=5)
    add_methods(tmp_path, manifest, [builder], approximate=ApproximateSettings(index="IVF1,Flat"))
    shards = [RetrievalIndex.open(tmp_path, shard=(n, parts)) for n in range(parts)]
    (merged,) = zip(*(shard.search_rows("meaning", vectors[:1], [8]) for shard in shards), strict=True)
    (hits,) = shards[0].hits([shards[0].merge(merged, 8)], 8)
    assert sorted(hits.ids) == [f"B{n:02d}" for n in range(1, 12, 2)]


def test_merged_shards_equal_the_index(tmp_path):
    index = make_index(tmp_path, ApproximateSettings(index="auto", k=20, part_rows=700))
    queries = clustered_vectors(5, 2)
    parts = [RetrievalIndex.open(tmp_path, shard=(n, 3)).search_rows("meaning", queries, [20] * 5) for n in range(3)]
    merged = [index.merge(shard_rows, 20) for shard_rows in zip(*parts, strict=True)]
    assert index.hits(merged, 20) == index.search_vectors("meaning", queries, 20)


def test_the_approximate_index_changes_without_new_vectors(tmp_path):
    make_index(tmp_path, ApproximateSettings())
    vectors = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("meaning-0*")}
    for name in ("IVF8,Flat", "auto", None, "exact"):
        index = make_index(tmp_path, ApproximateSettings(index=name, k=10))
        assert len(list(tmp_path.glob("*.faiss"))) == (name != "exact")
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("meaning-0*")} == vectors
        approximate = index.manifest.methods["meaning"].approximate
        assert (approximate and approximate["settings"]["index"]) == {None: "auto", "exact": None}.get(name, name)


def test_invalid_settings_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--approximate\.index IVF8,nonsense"):
        make_index(tmp_path / "absent", ApproximateSettings(index="IVF8,nonsense"))
    make_index(tmp_path / "index", ApproximateSettings(index="auto", k=10))
    (path,) = (tmp_path / "index").glob("*.faiss")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="cut short"):
        RetrievalIndex.open(tmp_path / "index")
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        RetrievalIndex.open(tmp_path / "index")
    make_index(tmp_path / "index", ApproximateSettings())
    assert path.is_file(), "made again"
    for file in (tmp_path / "index").glob("meaning-00*"):
        file.write_bytes(file.read_bytes()[:-50])
    path.write_bytes(path.read_bytes()[:-100])
    index = make_index(tmp_path / "index", ApproximateSettings())
    assert index.manifest.methods["meaning"].approximate["settings"]["index"] == "auto"
    assert len(index.search_vectors("meaning", clustered_vectors(1, 1), 10)[0]) == 10


def test_a_query_of_zeros_finds_nothing(tmp_path):
    index = make_index(tmp_path, ApproximateSettings(index="auto", k=10))
    queries = np.concatenate([np.zeros((1, WIDTH)), clustered_vectors(1, 1), np.zeros((1, WIDTH))])
    for exact in (False, True):
        assert [len(hits) for hits in index.search_vectors("meaning", queries, 10, exact=exact)] == [0, 10, 0]
