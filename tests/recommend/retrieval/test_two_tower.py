"""The method `tokens` of an index: vectors by a retriever, with a head for each training conversation."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lavic.cli import main
from lavic.distributed.ray_session import RaySettings, ray_session
from lavic.errors import ConfigError, DataError
from lavic.model.bundle import save_bundle
from lavic.model.config import ModelSettings
from lavic.model.item_store import ItemStore, write_manifest, write_part
from lavic.model.loading import Backbone
from lavic.model.two_tower.features import FeatureExtractor
from lavic.model.two_tower.folds import FINAL, submission_hashes
from lavic.model.two_tower.head import TwoTowerHead, save_head
from lavic.model.two_tower.retriever import Retriever, save_retriever
from lavic.recommend.recommender import Recommender
from lavic.recommend.retrieval import RetrievalIndex, query_text
from lavic.recommend.retrieval.build import VectorBuilder, add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row
from lavic.recommend.retrieval.vectors.sentence_encoder import DenseSettings, dense_settings
from lavic.recommend.retrieval.vectors.tokens_builder import TokensBuilder
from lavic.recommend.retrieval.vectors.two_tower import TokensSettings, TwoTowerEncoder, tokens_settings
from lavic.shards.retrieval import ray_work
from lavic.shards.retrieval.settings import RetrieveSettings
from tests.recommend.conftest import Ground

FOLDS = 2


@pytest.fixture(scope="module")
def retriever(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retriever with random heads, trained on the first twelve conversations so to speak."""
    folder = tmp_path_factory.mktemp("retriever")
    backbone = Backbone.load(ModelSettings(name=str(ground.store.parent / "base")), vision=False)
    widths = FeatureExtractor(backbone)
    files = {}
    for fold in (FINAL, *range(FOLDS)):
        torch.manual_seed(fold + 5)
        head = TwoTowerHead(widths.query_width, widths.item_width, dim=8, hidden=6)
        files[fold] = folder / f"{fold}.safetensors"
        save_head(head, files[fold], {})
    save_bundle(folder / "bundle", backbone, vision=ground.store / "vision_adapter")
    hashes = submission_hashes(ground.conversations[:12])
    save_retriever(folder / "bundle", files, hashes, dim=8, hidden=6, max_length=200)
    return folder


def make_index(folder: Path, ids: list[str], retriever: Path, store: Path, *, folds: bool = True, **more) -> None:
    recorded = tokens_settings(TokensSettings(retriever=retriever, folds=folds))
    folder.mkdir(exist_ok=True)
    manifest, before = prepare_index(folder, lambda: [Row(id, "") for id in ids], text={}, **more)
    add_methods(folder, manifest, [TokensBuilder(recorded, store, chunk_rows=16)], before)


def test_each_conversation_is_searched_for_by_its_own_head(ground: Ground, retriever: Path, tmp_path: Path) -> None:
    store, rows = ItemStore.open(ground.store), ground.conversations
    ids = [*store.ids, "B0ELSEWHERE"]
    make_index(tmp_path / "index", ids, retriever, ground.store)
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
        assert set(hits.ids) == set(store.ids)  # an item without tokens is never found
        np.testing.assert_allclose(hits.scores, np.sort(scores)[::-1] / 3**0.5, atol=1e-5)
    targets = [row.targets for row in rows]
    assert all(
        not set(hits.ids) & set(left)
        for hits, left in zip(
            index.search_vectors(
                "tokens", index.encode("tokens", [query_text(row) for row in rows]), 20, exclude=targets
            ),
            targets,
            strict=True,
        )
    )
    assert not index.search([""], 5)["tokens"][0].ids


def test_an_index_without_the_other_heads_says_what_its_lists_are(
    ground: Ground, retriever: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ItemStore.open(ground.store)
    make_index(tmp_path / "index", list(store.ids), retriever, ground.store, folds=False)
    index = RetrievalIndex.open(tmp_path / "index")
    assert index.manifest.methods["tokens"].width == 8
    queries = [query_text(row) for row in ground.conversations]
    index.search(queries[12:], 5)
    assert not caplog.records
    index.search(queries, 5)
    assert "12 queries are conversations that the retriever was trained on" in caplog.text


def test_a_larger_catalogue_keeps_its_vectors_and_another_retriever_is_refused(
    ground: Ground, retriever: Path, tmp_path: Path
) -> None:
    ids, index = list(ItemStore.open(ground.store).ids), tmp_path / "index"
    make_index(index, ids[:40], retriever, ground.store)
    before = {path.name: path.read_bytes() for path in index.glob("tokens-*")}
    assert len(before) == 3
    make_index(index, ids, retriever, ground.store, extend=True)
    after = {path.name: path.read_bytes() for path in index.glob("tokens-*")}
    assert len(after) == 4 and len(before.keys() & after.keys()) == 2
    make_index(tmp_path / "fresh", ids, retriever, ground.store)
    query = [query_text(ground.conversations[0])]
    grown, fresh = (RetrievalIndex.open(folder).search(query, 60) for folder in (index, tmp_path / "fresh"))
    assert grown == fresh

    recorded = tokens_settings(TokensSettings(retriever=retriever))
    manifest, _ = prepare_index(index, lambda: [Row(id, "") for id in ids], text={})
    with pytest.raises(DataError, match="`tokens` was made with other settings"):
        add_methods(index, manifest, [TokensBuilder({**recorded, "retriever": "another"}, ground.store)])
    with pytest.raises(ConfigError, match=r"--tokens\.retriever"):
        tokens_settings(TokensSettings())
    (tmp_path / "more").mkdir()
    manifest, _ = prepare_index(tmp_path / "more", lambda: [Row(ids[0], "")], text={})
    with pytest.raises(ConfigError, match="--store"):
        add_methods(tmp_path / "more", manifest, [TokensBuilder(recorded, None)])


class Embedded(list):
    """The items that are given to the retriever, as they come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        embed = TwoTowerEncoder.items

        def items(encoder: TwoTowerEncoder, store: ItemStore, ids: Sequence[str]) -> np.ndarray:
            self.extend(ids)
            return embed(encoder, store, ids)

        monkeypatch.setattr(TwoTowerEncoder, "items", items)


def embed_again(ground: Ground, folder: Path, counts: Sequence[int], changed: Collection[str]) -> Path:
    """The ground's store in parts of these sizes, with other tokens of the items named."""
    old = ItemStore.open(ground.store)
    shutil.copytree(ground.store / "vision_adapter", folder / "vision_adapter", dirs_exist_ok=True)
    backbone = Backbone.load(ModelSettings(name=str(ground.store.parent / "base")), vision=False)
    parts, start = [], 0
    for number, count in enumerate(counts):
        ids = list(old.ids)[start : start + count]
        tokens = old.lookup(ids).clone()
        tokens[[row for row, id in enumerate(ids) if id in changed]] *= -1
        items = [{"id": id, "key": old.key(id), "title": old.title(id)} for id in ids]
        parts.append(write_part(folder, f"{number:05d}", items, tokens))
        start += count
    write_manifest(folder, backbone, ground.store / "vision_adapter", parts)
    return folder


def test_an_index_of_items_that_were_embedded_again(
    ground: Ground, retriever: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused where it is served, and where it is made again only the rows of changed parts are."""
    ids = list(ItemStore.open(ground.store).ids)
    store = embed_again(ground, tmp_path / "store", (30, 20), ())
    make_index(tmp_path / "index", ids[:50], retriever, store)
    Recommender.load(ground.bundle, store, tmp_path / "index")

    embedded = Embedded(monkeypatch)
    embed_again(ground, store, (30, 20), ids[35:40])
    with pytest.raises(DataError, match=r"were embedded again \(1 of its parts\).*run the `lavic retrieve`") as refusal:
        Recommender.load(ground.bundle, store, tmp_path / "index")
    assert "\n" not in str(refusal.value) and str(store) in str(refusal.value)
    make_index(tmp_path / "index", ids[:50], retriever, store)
    assert embedded == ids[30:50], "the rows of the part that has changed"
    make_index(tmp_path / "fresh", ids[:50], retriever, store)
    query = [query_text(ground.conversations[0])]
    made, fresh = (RetrievalIndex.open(tmp_path / name).search(query, 60) for name in ("index", "fresh"))
    assert made == fresh
    assert len(list((tmp_path / "index").glob("tokens-*"))) == 4, "what is out of date is removed"
    Recommender.load(ground.bundle, store, tmp_path / "index")


def test_a_store_that_has_grown_leaves_an_index_as_it_is(
    ground: Ground, retriever: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(ItemStore.open(ground.store).ids)
    store = embed_again(ground, tmp_path / "store", (30, 20), ())
    make_index(tmp_path / "index", ids[:50], retriever, store)
    before = {path: path.read_bytes() for path in (tmp_path / "index").glob("tokens-*")}
    embed_again(ground, store, (30, 20, 10), ())
    embedded = Embedded(monkeypatch)
    Recommender.load(ground.bundle, store, tmp_path / "index")
    make_index(tmp_path / "index", ids[:50], retriever, store)
    assert embedded == [] and {path: path.read_bytes() for path in before} == before
    make_index(tmp_path / "index", ids, retriever, store, extend=True)
    assert embedded == ids[50:]


def test_a_growing_index_takes_new_tokens_of_old_items(ground: Ground, retriever: Path, tmp_path: Path) -> None:
    ids = list(ItemStore.open(ground.store).ids)
    store = embed_again(ground, tmp_path / "store", (30, 30), ())
    make_index(tmp_path / "index", ids[:40], retriever, store)
    embed_again(ground, store, (30, 30), ids[10:20])
    make_index(tmp_path / "index", ids, retriever, store, extend=True)
    make_index(tmp_path / "fresh", ids, retriever, store)
    query = [query_text(ground.conversations[0])]
    made, fresh = (RetrievalIndex.open(tmp_path / name).search(query, 60) for name in ("index", "fresh"))
    assert made == fresh


def test_an_index_of_another_retriever_or_model_is_refused_when_it_is_loaded(
    ground: Ground, retriever: Path, tmp_path: Path, sentence_model: Path
) -> None:
    """Not when the first request comes."""
    shutil.copytree(retriever / "bundle", tmp_path / "retriever")
    ids, index = list(ItemStore.open(ground.store).ids), tmp_path / "index"
    make_index(index, ids, tmp_path / "retriever", ground.store)
    info = json.loads((tmp_path / "retriever" / "bundle.json").read_text("utf-8"))
    (tmp_path / "retriever" / "bundle.json").write_text(json.dumps({**info, "vision_adapter": None}), "utf-8")
    with pytest.raises(DataError, match=r"another retriever \(vision_adapter .*put that one back"):
        Recommender.load(ground.bundle, ground.store, index)

    model, index = tmp_path / "model", tmp_path / "dense"
    shutil.copytree(sentence_model, model)
    builder = VectorBuilder("dense", dense_settings(DenseSettings(model=str(model))), lambda: np.ones_like)
    index.mkdir()
    manifest, _ = prepare_index(index, lambda: [Row(id, "") for id in ids], text={})
    add_methods(index, manifest, [builder])
    Recommender.load(ground.bundle, ground.store, index)
    (model / "1_Pooling" / "config.json").write_text("{}", "utf-8")
    with pytest.raises(ConfigError, match="another version of this model"):
        Recommender.load(ground.bundle, ground.store, index)


def test_the_command_takes_up_a_store_that_was_embedded_again(
    ground: Ground, retriever: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = embed_again(ground, tmp_path / "store", (30, 30), ())
    write_catalogue(tmp_path, ItemStore.open(store))
    again = Ground(ground.bundle, ground.titles_only, store, ground.test, ground.conversations)
    before = retrieve(again, retriever, tmp_path, "lists")
    embed_again(ground, store, (30, 30), list(ItemStore.open(store).ids)[30:])
    embedded = Embedded(monkeypatch)
    lists = retrieve(again, retriever, tmp_path, "lists")
    assert len(embedded) == 30 and lists != before
    assert lists == retrieve(again, retriever, tmp_path, "fresh")


def test_the_recommender_embeds_queries_with_its_own_model(ground: Ground, retriever: Path, tmp_path: Path) -> None:
    """One model in memory, its language adapter left out for the query, and back for the ranking."""
    store = ItemStore.open(ground.store)
    make_index(tmp_path / "index", list(store.ids), retriever, ground.store)
    recommender = Recommender.load(ground.bundle, ground.store, tmp_path / "index", retrieved=10)
    assert not recommender.ranker.bundle.merged
    queries = [query_text(row) for row in ground.conversations]
    expected = RetrievalIndex.open(tmp_path / "index").search(queries, 10)["tokens"]
    merged = Recommender.load(ground.bundle, ground.store)
    for _ in range(2):
        answers = recommender.recommend_batch(list(ground.conversations))
        for row, answer, hits in zip(ground.conversations, answers, expected, strict=True):
            assert sorted(item.id for item in answer) == sorted(hits.ids)
            scores = {item.id: item.scores["tokens"] for item in answer}
            assert [scores[id] for id in hits.ids] == pytest.approx(hits.scores, abs=1e-5)
            alone = merged.recommend(row, hits.ids)
            assert [item.probability for item in answer] == pytest.approx([i.probability for i in alone], abs=1e-5)
    again = recommender.reloaded(ground.bundle, ground.store, tmp_path / "index")
    assert again.ranker.bundle is recommender.ranker.bundle


def write_catalogue(folder: Path, store: ItemStore) -> Path:
    rows = [{"parent_asin": id, "title": store.title(id)} for id in store.ids]
    path = folder / "meta.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def words_and_tokens(ground: Ground, retriever: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a catalogue and `index-lists`, and `lists.jsonl` with weights of 1 and .2."""
    folder = tmp_path_factory.mktemp("fused")
    write_catalogue(folder, ItemStore.open(ground.store))
    weighted = ("--methods", "bm25", "tokens", "--weights", "1", "0.2", "--k", "60", "--no-exclude-mentioned")
    retrieve(ground, retriever, folder, "lists", *weighted)
    return folder


def test_weights_mean_the_same_to_the_recommender_and_to_the_command(ground: Ground, words_and_tokens: Path) -> None:
    store, index = ItemStore.open(ground.store), words_and_tokens / "index-lists"

    def found(methods: tuple[str, ...], weights: tuple[float, ...]) -> list[list[str]]:
        search = Recommender.load(ground.bundle, store.folder, index, methods=methods, weights=weights).search
        assert search is not None and search.methods == methods
        return [list(each.ids) for each in search.search(ground.conversations, 60, [()] * len(ground.conversations))]

    lists = lists_of(words_and_tokens / "lists.jsonl")
    assert found(("bm25", "tokens"), (1, 0.2)) == found(("tokens", "bm25"), (0.2, 1)) == lists
    assert found(("bm25", "tokens"), ()) == found(("bm25", "tokens"), (2, 2)) != lists
    queries = [query_text(row) for row in ground.conversations]
    alone = RetrievalIndex.open(index).search(queries, 60, methods=["bm25"])["bm25"]
    assert found(("bm25",), ()) == [hits.ids for hits in alone]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "bm25", "tokens", "--weights", "1"), "--weights: 1 for 2 methods: give one for each"),
        (("--weights", "1", "2"), "--weights: 2 for no --methods"),
        (("--methods", "dense"), "--methods dense: not searched by text in"),
    ],
)
@pytest.mark.parametrize("command", ["recommend", "serve", "register"])
def test_methods_and_weights_that_do_not_fit_the_index(
    ground: Ground, words_and_tokens: Path, capsys: pytest.CaptureFixture[str], command: str, words, message: str
) -> None:
    given = ["--bundle", ground.bundle, "--store", ground.store, "--index", words_and_tokens / "index-lists", *words]
    more = {"recommend": ("--conversation", "a mug"), "serve": ("--port", 0), "register": ("--name", "shop")}[command]
    assert main([command, *map(str, [*given, *more])]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
    with pytest.raises(ConfigError, match="nothing is searched without --index"):
        Recommender.load(ground.bundle, ground.store, methods=("bm25",))


def lists_of(path: Path) -> list[list[str]]:
    return [json.loads(line)["candidates_fused"] for line in path.read_text("utf-8").splitlines()]


def retrieve(ground: Ground, retriever: Path, folder: Path, out: str, *more: str) -> list[list[str]]:
    """`lavic retrieve`, with the index in `folder`; returns its lists."""
    words = ["--items", folder / "meta.jsonl", "--store", ground.store, "--conversations", ground.test]
    words += ["--index", folder / f"index-{out}", "--out", folder / f"{out}.jsonl", "--tokens.retriever", retriever]
    if "--methods" not in more:
        more += ("--methods", "tokens", "--k", "12")
    assert main(["retrieve", *map(str, words), "--draws", "100", *more]) == 0
    return lists_of(folder / f"{out}.jsonl")


def test_the_command_makes_index_and_lists(ground: Ground, retriever: Path, tmp_path: Path) -> None:
    write_catalogue(tmp_path, ItemStore.open(ground.store))
    lists = retrieve(ground, retriever, tmp_path, "lists")
    index = RetrievalIndex.open(tmp_path / "index-lists")
    excluded = [row.context_items for row in ground.conversations]
    queries = [query_text(row) for row in ground.conversations]
    found = index.search(queries, 12, exclude=excluded)["tokens"]
    assert lists == [hits.ids for hits in found]
    before = {path: path.read_bytes() for path in (tmp_path / "index-lists").iterdir() if path.is_file()}
    assert retrieve(ground, retriever, tmp_path, "lists") == lists
    assert {path: path.read_bytes() for path in before} == before


def test_a_retriever_that_was_moved_is_the_same_one(ground: Ground, retriever: Path, tmp_path: Path) -> None:
    write_catalogue(tmp_path, ItemStore.open(ground.store))
    here = tmp_path / "here"
    shutil.copytree(retriever / "bundle", here / "bundle")
    lists = retrieve(ground, here, tmp_path, "lists")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "index-lists").glob("*.safetensors")}
    there = here.rename(tmp_path / "there")
    assert retrieve(ground, there, tmp_path, "lists") == lists
    assert {path: path.stat().st_mtime_ns for path in files} == files, "nothing was made again"
    # the index now names the new place, for programs that are not told
    index = RetrievalIndex.open(tmp_path / "index-lists")
    assert index.manifest.methods["tokens"].settings["bundle"] == str(there / "bundle")
    assert index.search([query_text(ground.conversations[0])], 3)["tokens"][0].ids
    # while it still stands there, a copy elsewhere changes nothing
    assert retrieve(ground, retriever, tmp_path, "lists") == lists
    assert RetrievalIndex.open(tmp_path / "index-lists").manifest == index.manifest


def test_actors_make_the_same_files(
    ground: Ground, retriever: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actors of a Ray job, one after the other in this process."""
    ids = list(ItemStore.open(ground.store).ids)
    make_index(tmp_path / "here", ids, retriever, ground.store)

    def in_this_process(chunks, stages, settings):
        ((make, arguments, wants_gpu),) = stages
        assert wants_gpu
        return map(make(*pickle.loads(pickle.dumps(arguments))), chunks)

    monkeypatch.setattr(ray_work, "_map", in_this_process)
    chosen = RetrieveSettings(conversations=("c",), out=tmp_path, index=tmp_path / "there", store=ground.store)
    recorded = tokens_settings(TokensSettings(retriever=retriever))
    (tmp_path / "there").mkdir()
    manifest, _ = prepare_index(tmp_path / "there", lambda: [Row(id, "") for id in ids], text={})
    builder = TokensBuilder(recorded, ground.store, make=ray_work.embed_on_ray(chosen), chunk_rows=16)
    add_methods(tmp_path / "there", manifest, [builder])
    here, there = (sorted((tmp_path / name).glob("tokens-*")) for name in ("here", "there"))
    assert len(here) == 4 and [path.name for path in here] == [path.name for path in there]
    queries = [query_text(row) for row in ground.conversations]
    found = [RetrievalIndex.open(tmp_path / name).search(queries, 60) for name in ("here", "there")]
    assert found[0] == found[1]


@pytest.mark.ray
@pytest.mark.slow
def test_ray_makes_the_same_index_and_lists(ground: Ground, retriever: Path, tmp_path: Path) -> None:
    write_catalogue(tmp_path, ItemStore.open(ground.store))
    here = retrieve(ground, retriever, tmp_path, "here", "--executor", "local")
    with ray_session(RaySettings(cpus=2)):
        there = retrieve(ground, retriever, tmp_path, "there", "--ray.workers", "1", "--index-parts", "2")
    assert there == here
    files = [sorted(path.name for path in (tmp_path / f"index-{name}").glob("tokens-*")) for name in ("here", "there")]
    assert files[0] == files[1] != []
