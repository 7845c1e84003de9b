"""The method `tokens` of an index: item vectors and queries by a two-tower retriever with a head for each fold."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from lavic.errors import ConfigError, DataError
from lavic.model.item_store import ItemStore
from lavic.model.two_tower.folds import FINAL
from lavic.model.two_tower.retriever import Retriever
from lavic.recommend.recommender import Recommender
from lavic.recommend.retrieval import RetrievalIndex, query_text
from lavic.recommend.retrieval.build import add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row
from lavic.recommend.retrieval.vectors.tokens_builder import TokensBuilder
from lavic.recommend.retrieval.vectors.two_tower import TokensSettings, tokens_settings
from lavic.shards.retrieval import ray_work
from lavic.shards.retrieval.settings import RetrieveSettings
from tests.recommend.conftest import Assets
from tests.recommend.retrieval.tokens_index import (
    make_index,
)

pytestmark = pytest.mark.slow


def test_each_conversation_is_searched_with_the_head_of_its_fold(
    assets: Assets, retriever: Path, tmp_path: Path
) -> None:
    store, rows = ItemStore.open(assets.store), assets.conversations
    ids = [*store.ids, "B0ELSEWHERE"]
    make_index(tmp_path / "index", ids, retriever, assets.store)
    index = RetrievalIndex.open(tmp_path / "index")
    assert index.methods == index.text_methods == ("tokens",)
    lists = index.search([query_text(row) for row in rows], 100)["tokens"]

    loaded = Retriever.load(retriever)
    folds = loaded.folds(rows)
    assert set(folds) == {FINAL, 0, 1} and folds[12:].count(FINAL) == 12
    for row, fold, hits in zip(rows, folds, lists, strict=True):
        scores = (
            loaded.embed_items(store, list(store.ids), [fold])[0] @ loaded.embed_queries([row], [fold])[0]
        ).numpy()
        expected = [store.ids[n] for n in np.argsort(-scores)]
        assert hits.ids[:10] == expected[:10]
        assert set(hits.ids) == set(store.ids)  # items without tokens are never found
        np.testing.assert_allclose(hits.scores, np.sort(scores)[::-1] / 3**0.5, atol=1e-5)
    targets, queries = [row.targets for row in rows], [query_text(row) for row in rows]
    without_targets = index.search_vectors("tokens", index.encode("tokens", queries), 20, exclude=targets)
    assert all(not set(hits.ids) & set(row.targets) for hits, row in zip(without_targets, rows, strict=True))
    assert not index.search([""], 5)["tokens"][0].ids


def test_searching_training_conversations_without_fold_heads_warns(
    assets: Assets, retriever: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ItemStore.open(assets.store)
    make_index(tmp_path / "index", list(store.ids), retriever, assets.store, folds=False)
    index = RetrievalIndex.open(tmp_path / "index")
    assert index.manifest.methods["tokens"].width == 8
    queries = [query_text(row) for row in assets.conversations]
    index.search(queries[12:], 5)
    assert not caplog.records
    index.search(queries, 5)
    assert "12 queries are conversations that the retriever was trained on" in caplog.text


def test_extending_keeps_vectors_and_other_settings_are_refused(
    assets: Assets, retriever: Path, tmp_path: Path
) -> None:
    ids, index = list(ItemStore.open(assets.store).ids), tmp_path / "index"
    make_index(index, ids[:40], retriever, assets.store)
    before = {path.name: path.read_bytes() for path in index.glob("tokens-*")}
    assert len(before) == 3
    make_index(index, ids, retriever, assets.store, extend=True)
    after = {path.name: path.read_bytes() for path in index.glob("tokens-*")}
    assert len(after) == 4 and len(before.keys() & after.keys()) == 2
    make_index(tmp_path / "fresh", ids, retriever, assets.store)
    query = [query_text(assets.conversations[0])]
    grown, fresh = (RetrievalIndex.open(folder).search(query, 60) for folder in (index, tmp_path / "fresh"))
    assert grown == fresh

    recorded = tokens_settings(TokensSettings(retriever=retriever))
    manifest, _ = prepare_index(index, lambda: [Row(id, "") for id in ids], text={})
    with pytest.raises(DataError, match="`tokens` was made with other settings"):
        add_methods(index, manifest, [TokensBuilder({**recorded, "retriever": "another"}, assets.store)])
    with pytest.raises(ConfigError, match=r"--tokens\.retriever"):
        tokens_settings(TokensSettings())
    (tmp_path / "more").mkdir()
    manifest, _ = prepare_index(tmp_path / "more", lambda: [Row(ids[0], "")], text={})
    with pytest.raises(ConfigError, match="--store"):
        add_methods(tmp_path / "more", manifest, [TokensBuilder(recorded, None)])


def test_the_recommender_embeds_queries_with_the_rankers_model(assets: Assets, retriever: Path, tmp_path: Path) -> None:
    """One model in memory: its language adapter is off for the query and on for the ranking."""
    store = ItemStore.open(assets.store)
    make_index(tmp_path / "index", list(store.ids), retriever, assets.store)
    recommender = Recommender.load(assets.bundle, assets.store, tmp_path / "index", retrieved=10)
    assert not recommender.ranker.bundle.merged
    queries = [query_text(row) for row in assets.conversations]
    expected = RetrievalIndex.open(tmp_path / "index").search(queries, 10)["tokens"]
    merged = Recommender.load(assets.bundle, assets.store)
    for _ in range(2):
        answers = recommender.recommend_batch(list(assets.conversations))
        for row, answer, hits in zip(assets.conversations, answers, expected, strict=True):
            assert sorted(item.id for item in answer) == sorted(hits.ids)
            scores = {item.id: item.scores["tokens"] for item in answer}
            assert [scores[id] for id in hits.ids] == pytest.approx(hits.scores, abs=1e-5)
            ranked = merged.recommend(row, hits.ids)
            assert [item.probability for item in answer] == pytest.approx([i.probability for i in ranked], abs=1e-5)
    reloaded = recommender.reloaded(assets.bundle, assets.store, tmp_path / "index")
    assert reloaded.ranker.bundle is recommender.ranker.bundle


def test_ray_actors_write_the_same_files(
    assets: Assets, retriever: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actors of a Ray job run one after the other in this process."""
    ids = list(ItemStore.open(assets.store).ids)
    make_index(tmp_path / "local", ids, retriever, assets.store)

    def in_this_process(chunks, stages, settings):
        ((make, arguments, wants_gpu),) = stages
        assert wants_gpu
        return map(make(*pickle.loads(pickle.dumps(arguments))), chunks)

    monkeypatch.setattr(ray_work, "_map", in_this_process)
    settings = RetrieveSettings(conversations=("c",), out=tmp_path, index=tmp_path / "ray", store=assets.store)
    recorded = tokens_settings(TokensSettings(retriever=retriever))
    (tmp_path / "ray").mkdir()
    manifest, _ = prepare_index(tmp_path / "ray", lambda: [Row(id, "") for id in ids], text={})
    builder = TokensBuilder(recorded, assets.store, make=ray_work.embed_on_ray(settings), chunk_rows=16)
    add_methods(tmp_path / "ray", manifest, [builder])
    local_files, ray_files = (sorted((tmp_path / name).glob("tokens-*")) for name in ("local", "ray"))
    assert len(local_files) == 4 and [path.name for path in local_files] == [path.name for path in ray_files]
    queries = [query_text(row) for row in assets.conversations]
    results = [RetrievalIndex.open(tmp_path / name).search(queries, 60) for name in ("local", "ray")]
    assert results[0] == results[1]
