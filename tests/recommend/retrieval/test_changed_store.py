"""An index of item tokens after its item store, its retriever or its sentence encoder has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lavic.errors import ConfigError, DataError
from lavic.model.item_store import ItemStore
from lavic.recommend.recommender import Recommender
from lavic.recommend.retrieval import RetrievalIndex, query_text
from lavic.recommend.retrieval.build import VectorBuilder, add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row
from lavic.recommend.retrieval.vectors.sentence_encoder import DenseSettings, dense_settings
from tests.recommend.conftest import Assets
from tests.recommend.retrieval.tokens_index import (
    EmbeddedIds,
    make_index,
    retrieve,
    write_catalogue,
    write_store,
)

pytestmark = pytest.mark.slow


def test_items_embedded_again_are_refused_until_their_vectors_are_updated(
    assets: Assets, retriever: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recommender refuses the index; building it again embeds only the items of changed parts."""
    ids = list(ItemStore.open(assets.store).ids)
    store = write_store(assets, tmp_path / "store", (30, 20), ())
    make_index(tmp_path / "index", ids[:50], retriever, store)
    Recommender.load(assets.bundle, store, tmp_path / "index")

    embedded_ids = EmbeddedIds(monkeypatch)
    write_store(assets, store, (30, 20), ids[35:40])
    with pytest.raises(DataError, match=r"were embedded again \(1 of its parts\).*run the `lavic retrieve`") as refusal:
        Recommender.load(assets.bundle, store, tmp_path / "index")
    assert "\n" not in str(refusal.value) and str(store) in str(refusal.value)
    make_index(tmp_path / "index", ids[:50], retriever, store)
    assert embedded_ids == ids[30:50], "only the items of the changed part"
    make_index(tmp_path / "fresh", ids[:50], retriever, store)
    query = [query_text(assets.conversations[0])]
    updated, fresh = (RetrievalIndex.open(tmp_path / name).search(query, 60) for name in ("index", "fresh"))
    assert updated == fresh
    assert len(list((tmp_path / "index").glob("tokens-*"))) == 4, "files of outdated vectors are removed"
    Recommender.load(assets.bundle, store, tmp_path / "index")


def test_a_grown_store_leaves_the_index_unchanged(
    assets: Assets, retriever: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(ItemStore.open(assets.store).ids)
    store = write_store(assets, tmp_path / "store", (30, 20), ())
    make_index(tmp_path / "index", ids[:50], retriever, store)
    before = {path: path.read_bytes() for path in (tmp_path / "index").glob("tokens-*")}
    write_store(assets, store, (30, 20, 10), ())
    embedded_ids = EmbeddedIds(monkeypatch)
    Recommender.load(assets.bundle, store, tmp_path / "index")
    make_index(tmp_path / "index", ids[:50], retriever, store)
    assert embedded_ids == [] and {path: path.read_bytes() for path in before} == before
    make_index(tmp_path / "index", ids, retriever, store, extend=True)
    assert embedded_ids == ids[50:]


def test_extending_updates_vectors_of_changed_items(assets: Assets, retriever: Path, tmp_path: Path) -> None:
    ids = list(ItemStore.open(assets.store).ids)
    store = write_store(assets, tmp_path / "store", (30, 30), ())
    make_index(tmp_path / "index", ids[:40], retriever, store)
    write_store(assets, store, (30, 30), ids[10:20])
    make_index(tmp_path / "index", ids, retriever, store, extend=True)
    make_index(tmp_path / "fresh", ids, retriever, store)
    query = [query_text(assets.conversations[0])]
    extended, fresh = (RetrievalIndex.open(tmp_path / name).search(query, 60) for name in ("index", "fresh"))
    assert extended == fresh


def test_an_index_of_another_retriever_or_encoder_is_refused_at_load(
    assets: Assets, retriever: Path, tmp_path: Path, sentence_model: Path
) -> None:
    """At load, not at the first request."""
    shutil.copytree(retriever / "bundle", tmp_path / "retriever")
    ids, index = list(ItemStore.open(assets.store).ids), tmp_path / "index"
    make_index(index, ids, tmp_path / "retriever", assets.store)
    info = json.loads((tmp_path / "retriever" / "bundle.json").read_text("utf-8"))
    (tmp_path / "retriever" / "bundle.json").write_text(json.dumps({**info, "vision_adapter": None}), "utf-8")
    with pytest.raises(DataError, match=r"another retriever \(vision_adapter .*put that one back"):
        Recommender.load(assets.bundle, assets.store, index)

    model, index = tmp_path / "model", tmp_path / "dense"
    shutil.copytree(sentence_model, model)
    builder = VectorBuilder("dense", dense_settings(DenseSettings(model=str(model))), lambda: np.ones_like)
    index.mkdir()
    manifest, _ = prepare_index(index, lambda: [Row(id, "") for id in ids], text={})
    add_methods(index, manifest, [builder])
    Recommender.load(assets.bundle, assets.store, index)
    (model / "1_Pooling" / "config.json").write_text("{}", "utf-8")
    with pytest.raises(ConfigError, match="another version of this model"):
        Recommender.load(assets.bundle, assets.store, index)


def test_lavic_retrieve_updates_vectors_of_changed_items(
    assets: Assets, retriever: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(assets, tmp_path / "store", (30, 30), ())
    write_catalogue(tmp_path, ItemStore.open(store))
    changed = Assets(assets.bundle, assets.titles_only, store, assets.test, assets.conversations)
    before = retrieve(changed, retriever, tmp_path, "lists")
    write_store(assets, store, (30, 30), list(ItemStore.open(store).ids)[30:])
    embedded_ids = EmbeddedIds(monkeypatch)
    lists = retrieve(changed, retriever, tmp_path, "lists")
    assert len(embedded_ids) == 30 and lists != before
    assert lists == retrieve(changed, retriever, tmp_path, "fresh")
