"""The recommender as a program uses it: forms of a conversation, batches, long lists, threads."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch

import lavic
from lavic.data.schema import Conversation, Turn
from lavic.errors import ConfigError, DataError, LavicError
from lavic.recommend.candidates import Candidates
from lavic.recommend.conversation_forms import to_conversation
from lavic.recommend.ranking.request import Request
from lavic.recommend.recommendation import Query
from lavic.recommend.recommender import Recommender
from lavic.recommend.retrieval.bm25.build import Bm25Builder, Bm25Settings
from lavic.recommend.retrieval.build import add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row

from .conftest import KEY, Assets

TAGGED_TEXT = "<submission>I want a red striped mug</submission>\n<comment>Any ideas?</comment>"


@pytest.fixture(scope="module")
def recommender(assets: Assets) -> Recommender:
    return lavic.Recommender.load(assets.bundle, assets.store)


def queries(assets: Assets, count: int, size: int = 10) -> list[Query]:
    return [Query(conversation=c, candidates=c.candidates[KEY][:size]) for c in assets.conversations[:count]]


def test_importing_lavic_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import lavic; lavic.__version__; print('fine')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "fine\n"


def test_recommend_equals_the_ranker(assets: Assets, recommender: Recommender):
    conversation = assets.conversations[0]
    listed = conversation.candidates[KEY]
    (ranking,) = recommender.ranker.rank([Request(conversation=conversation, candidates=listed)])
    answer = recommender.recommend(conversation, listed, k=3)
    assert [item.id for item in answer] == list(ranking.ids[:3]) and answer.candidates == 10
    for item, probability, logprob in zip(answer, ranking.probabilities, ranking.logprobs, strict=False):
        assert item.probability == pytest.approx(probability, abs=1e-9) and item.logprob == logprob
        assert item.title == f"Acme mug {item.id[-2:]}" and item.photo == f"{item.id}_0" and item.scores == {}


@pytest.mark.parametrize(
    "form",
    [
        TAGGED_TEXT,
        ["I want a red striped mug", "Any ideas?"],
        [Turn("seeker", "I want a red striped mug"), Turn("comment", "Any ideas?")],
        [
            {"role": "system", "content": "You are a shop assistant."},
            {"role": "user", "content": "I want a red striped mug"},
            {"role": "assistant", "content": [{"type": "text", "text": "Any ideas?"}]},
        ],
        [{"role": "user", "content": "I want a red striped mug"}, {"role": "user", "content": "Any ideas?"}],
    ],
)
def test_conversation_formats_are_equivalent(form):
    expected = (Turn("seeker", "I want a red striped mug"), Turn("comment", "Any ideas?"))
    assert to_conversation(form).turns == expected


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("", "conversation: empty"),
        ([], "conversation: empty"),
        ([" "], "conversation: empty"),
        ([{"role": "assistant", "content": "How can I help?"}], "no message of a user"),
        ([{"role": "robot", "content": "a"}], r"conversation\[0\]: role 'robot'"),
        (["a lamp", 7], r"conversation\[1\]: int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"conversation\[0\]: a part of `content` is not text"),
        ([{"role": "user", "content": 3}], r"conversation\[0\]: `content` is neither"),
        (7, "conversation: int"),
    ],
)
def test_invalid_conversations_are_refused(form, message: str):
    with pytest.raises(DataError, match=message):
        to_conversation(form)


def test_unpaired_surrogates_are_replaced(recommender: Recommender):
    ids = recommender.store.ids[:2]
    assert len(recommender.recommend("a \ud83d mug", ids)) == 2
    assert len(recommender.recommend([{"role": "user", "content": "a \ud83d mug"}], ids)) == 2


def test_answers_do_not_depend_on_the_batch(assets: Assets, recommender: Recommender):
    batch = queries(assets, 12) + queries(assets, 12, size=3)
    together = recommender.recommend_batch(batch)
    for query, answer in zip(batch, together, strict=True):
        alone = recommender.recommend(query.conversation, query.candidates)
        assert [item.id for item in alone] == [item.id for item in answer]
        for expected, item in zip(alone, answer, strict=True):
            assert expected.probability == pytest.approx(item.probability, abs=1e-5)


@pytest.mark.slow
def test_a_list_longer_than_in_training_is_ranked_in_groups(assets: Assets, recommender: Recommender):
    listed = recommender.store.ids[:35]
    answer = recommender.recommend(TAGGED_TEXT, listed, k=50)
    assert sorted(item.id for item in answer) == sorted(listed) and answer.candidates == 35
    probabilities = [item.probability for item in answer]
    assert math.fsum(probabilities) == pytest.approx(1) and probabilities == sorted(probabilities, reverse=True)
    # 35 in groups of 10: four groups, two of each go on; the best eight are ordered by one prompt.
    last = [item.id for item in answer if item.id in _last_group(recommender, listed)]
    (ranking,) = recommender.ranker.rank(
        [Request(conversation=to_conversation(TAGGED_TEXT), candidates=_last_group(recommender, listed))]
    )
    assert last == list(ranking.ids) and len(last) == 8


def _last_group(recommender: Recommender, listed: list[str]) -> tuple[str, ...]:
    conversation = to_conversation(TAGGED_TEXT)
    groups = [tuple(listed[first::4]) for first in range(4)]
    rankings = recommender.ranker.rank([Request(conversation=conversation, candidates=group) for group in groups])
    return tuple(ranking.ids[position] for position in range(2) for ranking in rankings)


def test_a_failed_query_does_not_affect_the_others(assets: Assets, recommender: Recommender, monkeypatch):
    """A prompt that is too long is only known after tokenization."""
    batch = queries(assets, 3)
    listed = {item for query in batch for item in query.candidates or ()}
    others = [item for item in recommender.store.ids if item not in listed]
    batch[1] = Query(conversation=TAGGED_TEXT, candidates=others[:10])
    title = recommender.store.title
    monkeypatch.setattr(
        type(recommender.store),
        "title",
        lambda self, id: "mug " * 400 if id == others[0] else title(id),
    )
    answers = recommender.answer([recommender.check(query) for query in batch])
    assert isinstance(answers[1], DataError) and "10 candidates alone need" in str(answers[1])
    assert [isinstance(answer, LavicError) for answer in answers] == [False, True, False]
    with pytest.raises(DataError, match="candidates alone need"):
        recommender.recommend_batch(batch)


@pytest.mark.parametrize("share", [4, 1])
def test_retrieved_candidates_with_long_titles_are_ranked_in_smaller_groups(
    assets: Assets, recommender: Recommender, monkeypatch: pytest.MonkeyPatch, share: int
):
    """Only a list that the caller gave is refused. Of titles that are longer than a prompt the beginning is shown."""
    long_titled = recommender.store.ids[:6]
    title = recommender.store.title
    limit = recommender.ranker.bundle.info.max_length
    monkeypatch.setattr(
        type(recommender.store), "title", lambda self, id: "mug " * (limit // share) if id in long_titled else title(id)
    )
    retrieved = Candidates(ids=tuple(long_titled), scores={"bm25": dict.fromkeys(long_titled, 1.0)})
    search = SimpleNamespace(
        search=lambda conversations, count, excluded: [retrieved for _ in conversations],
        score=lambda conversation, ids: {},
        index=SimpleNamespace(check_files=lambda: None),
    )
    searching = Recommender(recommender.ranker, search, retrieved=6)  # type: ignore[arg-type]
    answer = searching.recommend("a mug", k=6)
    assert sorted(item.id for item in answer) == sorted(long_titled)
    assert math.fsum(item.probability for item in answer) == pytest.approx(1)
    with pytest.raises(DataError, match="candidates alone need"):
        searching.recommend("a mug", long_titled)


def test_invalid_queries_are_refused(assets: Assets, recommender: Recommender):
    item = recommender.store.ids[0]
    with pytest.raises(ConfigError, match="no retrieval index"):
        recommender.recommend("a mug")
    with pytest.raises(DataError, match="candidates: B0NOWHERE0 is not in the item store"):
        recommender.recommend("a mug", ["B0NOWHERE0", item])
    with pytest.raises(DataError, match=f"did you mean {item}"):
        recommender.recommend("a mug", [item.lower()])
    with pytest.raises(DataError, match="candidates: an empty list"):
        recommender.recommend("a mug", [])
    with pytest.raises(DataError, match="k: 0"):
        recommender.recommend("a mug", [item], k=0)
    with pytest.raises(DataError, match="queries: a text where a list of queries was expected"):
        recommender.recommend_batch("a mug")
    for k in (True, "3", 2.5, None):
        with pytest.raises(DataError, match=f"k: {k!r}; ask for a number of items"):
            recommender.recommend("a mug", [item], k=k)
    for ids in (item, [5], [None], [item, item.encode()]):
        with pytest.raises(DataError, match=r"candidates: .* is not a list of item ids as text"):
            recommender.recommend("a mug", ids)
        with pytest.raises(DataError, match=r"exclude: .* is not a list of item ids as text"):
            recommender.recommend("a mug", [item], exclude=ids)


def test_excluded_and_repeated_candidates_are_removed(recommender: Recommender):
    first, second, third = recommender.store.ids[:3]
    answer = recommender.recommend("a mug", [first, second, second, third], exclude=[third])
    assert sorted(item.id for item in answer) == sorted([first, second])
    assert len(recommender.recommend("a mug", [first], exclude=[first])) == 0


@pytest.fixture(scope="module")
def searching(assets: Assets, recommender: Recommender, index: Path) -> Recommender:
    return recommender.reloaded(assets.bundle, assets.store, index, retrieved=25)


def test_candidates_are_retrieved_from_the_index(searching: Recommender):
    number = searching.store.ids[7][-2:]
    answer = searching.recommend(f"an acme mug with {number}")
    assert len(answer) == 10 and answer.candidates == 25
    for item in answer:
        assert item.id in searching.store and set(item.scores) == {"bm25"} and item.scores["bm25"] > 0
    (hits,) = searching.search.index.search([f"an acme mug with {number}"], 100)["bm25"]
    expected = [item for item in hits.ids if item in searching.store][:25]
    all_retrieved = searching.recommend(f"an acme mug with {number}", k=100)
    assert sorted(item.id for item in all_retrieved) == sorted(expected)
    (from_batch,) = searching.recommend_batch([Query(conversation=f"an acme mug with {number}")])
    assert [item.id for item in from_batch] == [item.id for item in answer]


def test_an_index_of_many_items_that_the_store_lacks_is_searched_deeper(
    assets: Assets, recommender: Recommender, tmp_path: Path
):
    title = recommender.store.title
    rows = [Row(f"B0AA{number:06d}", "Acme mug 00") for number in range(3000)]  # before the store's in every tie
    rows += [Row(item, title(item)) for item in recommender.store.ids]
    manifest, before = prepare_index(tmp_path, lambda: rows, text={"fields": ["title"]})
    add_methods(tmp_path, manifest, [Bm25Builder(Bm25Settings())], before)
    searching = recommender.reloaded(assets.bundle, assets.store, tmp_path, retrieved=25)
    answers = searching.recommend_batch(["an acme mug", "a mug 00", "nothing known"])
    assert [answer.candidates for answer in answers] == [25, 25, 0]
    excluded = [item.id for item in searching.recommend("an acme mug", k=25)]
    others = searching.recommend("an acme mug", k=25, exclude=excluded)
    assert others.candidates == 25 and not {item.id for item in others} & set(excluded)


def test_items_that_a_conversation_has_named_are_not_retrieved(assets: Assets, searching: Recommender):
    row = assets.conversations[0]
    first = searching.recommend(row, k=1)[0].id
    naming = replace(row, context_items=(first,))
    assert first not in {item.id for item in searching.recommend(naming, k=100)}
    assert first in {item.id for item in searching.recommend(naming, [first, *searching.store.ids[:3]])}


def test_item_ids_may_be_an_array_or_a_column(recommender: Recommender):
    listed = list(recommender.store.ids[:4])
    expected = [item.id for item in recommender.recommend("a mug", listed, exclude=listed[:1])]
    for form in (np.array, pandas.Series, iter):
        answer = recommender.recommend("a mug", form(listed), exclude=form(listed[:1]))
        assert [item.id for item in answer] == expected


def test_searched_and_named_candidates_in_one_batch(searching: Recommender):
    named = searching.store.ids[:3]
    batch = [
        Query(conversation="mug"),
        Query(conversation="mug", candidates=named),
        Query(conversation="xyzzy"),
        Query(conversation="mug", exclude=[item.id for item in searching.recommend("mug", k=1)]),
    ]
    first, second, nothing, other = searching.recommend_batch(batch)
    assert [item.id for item in first] == [item.id for item in searching.recommend("mug")]
    assert sorted(item.id for item in second) == sorted(named)
    assert all(item.scores["bm25"] > 0 for item in second)
    assert len(nothing) == 0 and nothing.candidates == 0
    assert first[0].id not in {item.id for item in other} and len(other) == 10


def test_reloaded_keeps_the_model_and_replaces_the_store(assets: Assets, recommender: Recommender, tmp_path: Path):
    shutil.copytree(assets.store, tmp_path / "store")
    reloaded = recommender.reloaded(assets.bundle, tmp_path / "store")
    assert reloaded.ranker.bundle is recommender.ranker.bundle and reloaded.store.folder == tmp_path / "store"
    other = recommender.reloaded(assets.titles_only, assets.store)
    assert other.ranker.bundle is not recommender.ranker.bundle
    with pytest.raises(DataError, match="no such item store"):
        recommender.reloaded(assets.bundle, tmp_path / "nowhere")


def test_reloaded_keeps_settings(assets: Assets, index: Path):
    settings = {"retrieved": 7, "tokens_per_item": 2, "methods": ["bm25"], "weights": [2.0], "dtype": "bfloat16"}
    first = Recommender.load(assets.bundle, assets.store, index, **settings)
    again = first.reloaded(assets.bundle, assets.store, index)
    assert (again.retrieved, again.ranker.tokens_per_item, again.search.weights) == (7, 2, {"bm25": 2.0})
    other = again.reloaded(assets.titles_only, assets.store, tokens_per_item=3)
    assert other.search is None and other.ranker.tokens_per_item == 3
    assert other.ranker.bundle.backbone.model.dtype == torch.bfloat16
    assert other.reloaded(assets.titles_only, assets.store, index).retrieved == 7


def test_concurrent_threads_get_the_same_answers(assets: Assets, recommender: Recommender):
    batch = queries(assets, 16)
    expected = [[item.id for item in answer] for answer in recommender.recommend_batch(batch)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda query: recommender.recommend(query.conversation, query.candidates), batch * 2))
    assert [[item.id for item in answer] for answer in answers] == expected * 2


def test_a_row_without_text_is_ranked(recommender: Recommender):
    """`lavic recommend` ranks rows of files whose text is empty, as `lavic evaluate` does."""
    empty = Conversation(id="row", turns=())
    assert len(recommender.recommend(empty, recommender.store.ids[:4])) == 4


def test_the_size_of_training_lists_is_read_from_the_bundle(assets: Assets, recommender: Recommender):
    assert recommender.list_size == 10
    assert Recommender(recommender.ranker, list_size=4).list_size == 4
    listed = recommender.store.ids[:12]
    small = Recommender(recommender.ranker, list_size=4).recommend("a mug", listed, k=12)
    assert sorted(item.id for item in small) == sorted(listed)
