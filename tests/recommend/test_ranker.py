"""Scores are those of the whole sequence, whoever is in the batch; wrong input is refused in one line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lavic.data.schema import Conversation, Turn
from lavic.errors import DataError
from lavic.model import prompts
from lavic.model.bundle import Bundle
from lavic.model.inputs.label_mask import collate
from lavic.model.inputs.token_loss import token_losses
from lavic.model.item_store import ItemStore
from lavic.model.visual_tokens import project
from lavic.recommend.ranking.ranker import Ranker
from lavic.recommend.ranking.request import Request

from .conftest import KEY, Ground


def requests(ground: Ground, count: int = 24) -> list[Request]:
    return [Request(conversation=c, candidates=c.candidates[KEY]) for c in ground.conversations[:count]]


def by_id(ranking) -> dict[str, float]:
    return dict(zip(ranking.ids, ranking.logprobs, strict=True))


def whole_sequence(bundle: Bundle, store: ItemStore, request: Request) -> dict[str, float]:
    """The log-probability of each id by the plain way: one full sequence per candidate, the training loss."""
    encoder, model = bundle.backbone.encoder, bundle.backbone.model
    listed = [prompts.Candidate(item, store.title(item)) for item in request.candidates]
    photos = project(model, store.tokens(request.candidates)) if bundle.info.tokens == "items" else None
    scores = {}
    for item in request.candidates:
        example = encoder.recommendation(
            request.conversation, listed, photo_tokens=5 if photos is not None else 0, target=item, max_length=512
        )
        with torch.no_grad():
            scores[item] = -float(token_losses(model, collate([example], encoder.pad), photos).double().sum())
    return scores


@pytest.mark.parametrize("which", ["bundle", "titles_only"])
def test_scores_are_those_of_the_whole_sequence(ground: Ground, which: str):
    bundle, store = Bundle.load(getattr(ground, which)), ItemStore.open(ground.store)
    asked = requests(ground, 6)
    for request, ranking in zip(asked, Ranker(bundle, store).rank(asked), strict=True):
        expected = whole_sequence(bundle, store, request)
        assert by_id(ranking) == pytest.approx(expected, abs=1e-5)
        assert max(expected.values()) - min(expected.values()) > 1e-3  # there is something to tell apart
        assert list(ranking.ids) == sorted(expected, key=lambda item: -expected[item])
        assert sum(ranking.probabilities) == pytest.approx(1)


def test_batch_mates_change_nothing(ground: Ground):
    bundle, store = Bundle.load(ground.bundle), ItemStore.open(ground.store)
    asked = requests(ground)
    together = Ranker(bundle, store, tokens_per_batch=1_000_000).rank(asked)
    alone = Ranker(bundle, store, tokens_per_batch=1).rank(asked)
    backwards = Ranker(bundle, store, tokens_per_batch=2000).rank(asked[::-1])[::-1]
    for a, b, c in zip(together, alone, backwards, strict=True):
        assert by_id(a) == pytest.approx(by_id(b), abs=1e-5)
        assert by_id(a) == pytest.approx(by_id(c), abs=1e-5)


def test_lists_of_unequal_length_share_a_batch(ground: Ground):
    ranker = Ranker(Bundle.load(ground.bundle), ItemStore.open(ground.store))
    asked = [replace(request, candidates=request.candidates[:n]) for n, request in enumerate(requests(ground, 5))]
    together = ranker.rank(asked)
    assert [len(ranking.ids) for ranking in together] == [0, 1, 2, 3, 4]
    assert together[0].probabilities == ()
    for request, ranking in zip(asked, together, strict=True):
        assert by_id(ranking) == pytest.approx(by_id(ranker.rank([request])[0]), abs=1e-5)


def test_repeated_candidates_are_shown_once(ground: Ground):
    ranker = Ranker(Bundle.load(ground.bundle), ItemStore.open(ground.store))
    (request,) = requests(ground, 1)
    doubled = replace(request, candidates=(*request.candidates, *request.candidates[:3]))
    assert ranker.rank([doubled]) == ranker.rank([request])


def test_tokens_of_another_item_change_the_scores_and_its_own_do_not(ground: Ground):
    ranker = Ranker(Bundle.load(ground.bundle), ItemStore.open(ground.store))
    (request,) = requests(ground, 1)
    same = {item: item for item in request.candidates}
    turned = dict(zip(request.candidates, request.candidates[1:] + request.candidates[:1], strict=True))
    plain, unchanged, moved = (
        ranker.rank([replace(request, tokens_of=tokens_of)])[0] for tokens_of in (None, same, turned)
    )
    assert by_id(plain) == by_id(unchanged)
    assert max(abs(by_id(plain)[item] - by_id(moved)[item]) for item in request.candidates) > 1e-3


def test_words_take_the_place_of_tokens(ground: Ground):
    ranker = Ranker(Bundle.load(ground.bundle), ItemStore.open(ground.store))
    (request,) = requests(ground, 1)
    red = replace(request, texts=dict.fromkeys(request.candidates, "red striped"))
    blue = replace(request, texts={**red.texts, request.candidates[0]: "blue dotted"})
    assert ranker.encode(red).prompt.count(ranker.encoder.image_token_id) == 0
    assert by_id(ranker.rank([red])[0]) != pytest.approx(by_id(ranker.rank([blue])[0]), abs=1e-3)
    mixed = ranker.rank([red, request])
    assert by_id(mixed[1]) == pytest.approx(by_id(ranker.rank([request])[0]), abs=1e-5)


def test_free_text_is_the_greedy_path(ground: Ground):
    bundle, store = Bundle.load(ground.bundle), ItemStore.open(ground.store)
    ranker = Ranker(bundle, store)
    (request,) = requests(ground, 1)
    (answer,) = ranker.rank([request], decode="generate")
    assert answer.text is not None
    # The first token by the plain way: the most probable one after the prompt.
    encoded = ranker.encode(request)
    from lavic.model.inputs.token_loss import splice, unwrap_peft

    model = unwrap_peft(bundle.backbone.model)
    with torch.no_grad():
        embeds = splice(model, torch.tensor([encoded.prompt]), ranker._image_features([encoded]))
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        first = int(model.lm_head(hidden[:, -1]).argmax())
    text = bundle.backbone.tokenizer.decode([first], skip_special_tokens=True).strip()
    assert answer.text.startswith(text)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("{0}", "{0}"),
        ("I would take {0}, or {1}.", "{0}"),
        ("B0ABCDEFGH is best", "B0ABCDEFGH"),
        ("the red one", None),
        ("", None),
    ],
)
def test_reading_the_id_out_of_free_text(ground: Ground, text: str, read: str | None):
    ranker = Ranker(Bundle.load(ground.bundle), ItemStore.open(ground.store))
    listed = ground.conversations[0].candidates[KEY]
    assert ranker._parse_id(text.format(*listed), listed) == (read.format(*listed) if read else None)
    dotted = [f"{item}.X" for item in listed]  # ids of a store, with more behind them, are other ids
    assert ranker._parse_id(text.format(*dotted), dotted) == (read.format(*dotted) if read else None)


def test_long_conversations_are_shortened_not_refused(ground: Ground):
    ranker = Ranker(Bundle.load(ground.bundle), ItemStore.open(ground.store))
    turns = (Turn("seeker", "I want a red mug"), *[Turn("comment", "Any ideas " * 40)] * 30)
    long = Conversation(id="long", turns=turns, candidates=ground.conversations[0].candidates)
    request = Request(conversation=long, candidates=long.candidates[KEY])
    assert len(ranker.encode(request).prompt) <= 512
    assert len(ranker.rank([request])[0].ids) == 10


def test_candidates_that_are_not_in_the_store_are_named(ground: Ground):
    ranker = Ranker(Bundle.load(ground.bundle), ItemStore.open(ground.store))
    (request,) = requests(ground, 1)
    with pytest.raises(DataError, match=r"test\.jsonl:1: candidate B0NOWHERE0 of 11 is not in the item store"):
        ranker.rank([replace(request, candidates=(*request.candidates, "B0NOWHERE0"))])
