"""`lavic retrieve` with the method `tokens`, and the recommender that searches its index."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lavic.cli import main
from lavic.distributed.ray_session import RaySettings, ray_session
from lavic.errors import ConfigError
from lavic.model.item_store import ItemStore
from lavic.recommend.recommender import Recommender
from lavic.recommend.retrieval import RetrievalIndex, query_text
from tests.recommend.conftest import Assets
from tests.recommend.retrieval.tokens_index import (
    read_lists,
    retrieve,
    write_catalogue,
)


@pytest.fixture(scope="module")
def hybrid_index(assets: Assets, retriever: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a catalogue and `index-lists`, and `lists.jsonl` with weights of 1 and .2."""
    folder = tmp_path_factory.mktemp("fused")
    write_catalogue(folder, ItemStore.open(assets.store))
    weighted = ("--methods", "bm25", "tokens", "--weights", "1", "0.2", "--k", "60", "--no-exclude-mentioned")
    retrieve(assets, retriever, folder, "lists", *weighted)
    return folder


def test_weights_give_the_recommender_and_lavic_retrieve_equal_lists(assets: Assets, hybrid_index: Path) -> None:
    store, index = ItemStore.open(assets.store), hybrid_index / "index-lists"

    def search_ids(methods: tuple[str, ...], weights: tuple[float, ...]) -> list[list[str]]:
        search = Recommender.load(assets.bundle, store.folder, index, methods=methods, weights=weights).search
        assert search is not None and search.methods == methods
        return [list(each.ids) for each in search.search(assets.conversations, 60, [()] * len(assets.conversations))]

    lists = read_lists(hybrid_index / "lists.jsonl")
    assert search_ids(("bm25", "tokens"), (1, 0.2)) == search_ids(("tokens", "bm25"), (0.2, 1)) == lists
    assert search_ids(("bm25", "tokens"), ()) == search_ids(("bm25", "tokens"), (2, 2)) != lists
    queries = [query_text(row) for row in assets.conversations]
    alone = RetrievalIndex.open(index).search(queries, 60, methods=["bm25"])["bm25"]
    assert search_ids(("bm25",), ()) == [hits.ids for hits in alone]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "bm25", "tokens", "--weights", "1"), "--weights: 1 for 2 methods: give one for each"),
        (("--weights", "1", "2"), "--weights: 2 for no --methods"),
        (("--methods", "dense"), "--methods dense: not searched by text in"),
    ],
)
@pytest.mark.parametrize("command", ["recommend", "serve", "register"])
@pytest.mark.slow
def test_methods_and_weights_that_do_not_fit_the_index_are_refused(
    assets: Assets, hybrid_index: Path, capsys: pytest.CaptureFixture[str], command: str, options, message: str
) -> None:
    argv = ["--bundle", assets.bundle, "--store", assets.store, "--index", hybrid_index / "index-lists", *options]
    argv += {"recommend": ("--conversation", "a mug"), "serve": ("--port", 0), "register": ("--name", "shop")}[command]
    assert main([command, *map(str, argv)]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
    with pytest.raises(ConfigError, match="nothing is searched without --index"):
        Recommender.load(assets.bundle, assets.store, methods=("bm25",))


def test_lavic_retrieve_writes_index_and_lists(assets: Assets, retriever: Path, tmp_path: Path) -> None:
    write_catalogue(tmp_path, ItemStore.open(assets.store))
    lists = retrieve(assets, retriever, tmp_path, "lists")
    index = RetrievalIndex.open(tmp_path / "index-lists")
    excluded = [row.context_items for row in assets.conversations]
    queries = [query_text(row) for row in assets.conversations]
    expected = index.search(queries, 12, exclude=excluded)["tokens"]
    assert lists == [hits.ids for hits in expected]
    before = {path: path.read_bytes() for path in (tmp_path / "index-lists").iterdir() if path.is_file()}
    assert retrieve(assets, retriever, tmp_path, "lists") == lists
    assert {path: path.read_bytes() for path in before} == before


def test_a_moved_retriever_does_not_rebuild_the_index(assets: Assets, retriever: Path, tmp_path: Path) -> None:
    write_catalogue(tmp_path, ItemStore.open(assets.store))
    original = tmp_path / "original"
    shutil.copytree(retriever / "bundle", original / "bundle")
    lists = retrieve(assets, original, tmp_path, "lists")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "index-lists").glob("*.safetensors")}
    moved = original.rename(tmp_path / "moved")
    assert retrieve(assets, moved, tmp_path, "lists") == lists
    assert {path: path.stat().st_mtime_ns for path in files} == files, "nothing was built again"
    # the index now records the new place, for programs that are not given it
    index = RetrievalIndex.open(tmp_path / "index-lists")
    assert index.manifest.methods["tokens"].settings["bundle"] == str(moved / "bundle")
    assert index.search([query_text(assets.conversations[0])], 3)["tokens"][0].ids
    # while the retriever still exists there, a copy elsewhere changes nothing
    assert retrieve(assets, retriever, tmp_path, "lists") == lists
    assert RetrievalIndex.open(tmp_path / "index-lists").manifest == index.manifest


@pytest.mark.ray
@pytest.mark.slow
def test_ray_writes_the_same_index_and_lists(assets: Assets, retriever: Path, tmp_path: Path) -> None:
    write_catalogue(tmp_path, ItemStore.open(assets.store))
    local_lists = retrieve(assets, retriever, tmp_path, "local", "--executor", "local")
    with ray_session(RaySettings(cpus=2)):
        ray_lists = retrieve(assets, retriever, tmp_path, "ray", "--ray.workers", "1", "--index-parts", "2")
    assert ray_lists == local_lists
    files = [sorted(path.name for path in (tmp_path / f"index-{name}").glob("tokens-*")) for name in ("local", "ray")]
    assert files[0] == files[1] != []
