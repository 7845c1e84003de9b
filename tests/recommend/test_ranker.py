"""Scores are those of the whole sequence, whoever is in the batch; wrong input is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lavic.data.schema import Conversation, Turn
from lavic.errors import DataError
from lavic.model import prompts
from lavic.model.bundle import Bundle
from lavic.model.generation import Continuation
from lavic.model.inputs.label_mask import collate
from lavic.model.inputs.token_loss import token_losses
from lavic.model.item_store import ItemStore, write_manifest, write_part
from lavic.model.visual_tokens import project
from lavic.recommend.ranking.ranker import Ranker
from lavic.recommend.ranking.request import Request

from .conftest import KEY, Assets


def requests(assets: Assets, count: int = 24) -> list[Request]:
    return [Request(conversation=c, candidates=c.candidates[KEY]) for c in assets.conversations[:count]]


def by_id(ranking) -> dict[str, float]:
    return dict(zip(ranking.ids, ranking.logprobs, strict=True))


def logprobs_by_full_sequences(bundle: Bundle, store: ItemStore, request: Request) -> dict[str, float]:
    """The log-probability of each id from one full sequence per candidate and the training loss."""
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


@pytest.mark.parametrize("bundle_name", ["bundle", "titles_only"])
def test_scores_equal_those_of_full_sequences(assets: Assets, bundle_name: str):
    bundle, store = Bundle.load(getattr(assets, bundle_name)), ItemStore.open(assets.store)
    batch = requests(assets, 6)
    for request, ranking in zip(batch, Ranker(bundle, store).rank(batch), strict=True):
        expected = logprobs_by_full_sequences(bundle, store, request)
        assert by_id(ranking) == pytest.approx(expected, abs=1e-5)
        assert max(expected.values()) - min(expected.values()) > 1e-3  # the scores differ
        assert list(ranking.ids) == sorted(expected, key=lambda item: -expected[item])
        assert sum(ranking.probabilities) == pytest.approx(1)


def test_scores_do_not_depend_on_batch_mates(assets: Assets):
    bundle, store = Bundle.load(assets.bundle), ItemStore.open(assets.store)
    batch = requests(assets)
    together = Ranker(bundle, store, tokens_per_batch=1_000_000).rank(batch)
    alone = Ranker(bundle, store, tokens_per_batch=1).rank(batch)
    backwards = Ranker(bundle, store, tokens_per_batch=2000).rank(batch[::-1])[::-1]
    for a, b, c in zip(together, alone, backwards, strict=True):
        assert by_id(a) == pytest.approx(by_id(b), abs=1e-5)
        assert by_id(a) == pytest.approx(by_id(c), abs=1e-5)


def test_lists_of_unequal_length_share_a_batch(assets: Assets):
    ranker = Ranker(Bundle.load(assets.bundle), ItemStore.open(assets.store))
    batch = [replace(request, candidates=request.candidates[:n]) for n, request in enumerate(requests(assets, 5))]
    together = ranker.rank(batch)
    assert [len(ranking.ids) for ranking in together] == [0, 1, 2, 3, 4]
    assert together[0].probabilities == ()
    for request, ranking in zip(batch, together, strict=True):
        assert by_id(ranking) == pytest.approx(by_id(ranker.rank([request])[0]), abs=1e-5)


def test_repeated_candidates_are_shown_once(assets: Assets):
    ranker = Ranker(Bundle.load(assets.bundle), ItemStore.open(assets.store))
    (request,) = requests(assets, 1)
    doubled = replace(request, candidates=(*request.candidates, *request.candidates[:3]))
    assert ranker.rank([doubled]) == ranker.rank([request])


def test_tokens_of_other_items_change_the_scores(assets: Assets):
    ranker = Ranker(Bundle.load(assets.bundle), ItemStore.open(assets.store))
    (request,) = requests(assets, 1)
    same = {item: item for item in request.candidates}
    rotated = dict(zip(request.candidates, request.candidates[1:] + request.candidates[:1], strict=True))
    plain, unchanged, changed = (
        ranker.rank([replace(request, tokens_of=tokens_of)])[0] for tokens_of in (None, same, rotated)
    )
    assert by_id(plain) == by_id(unchanged)
    assert max(abs(by_id(plain)[item] - by_id(changed)[item]) for item in request.candidates) > 1e-3


def test_texts_replace_tokens(assets: Assets):
    ranker = Ranker(Bundle.load(assets.bundle), ItemStore.open(assets.store))
    (request,) = requests(assets, 1)
    red = replace(request, texts=dict.fromkeys(request.candidates, "red striped"))
    blue = replace(request, texts={**red.texts, request.candidates[0]: "blue dotted"})
    assert ranker.encode(red).prompt.count(ranker.encoder.image_token_id) == 0
    assert by_id(ranker.rank([red])[0]) != pytest.approx(by_id(ranker.rank([blue])[0]), abs=1e-3)
    mixed = ranker.rank([red, request])
    assert by_id(mixed[1]) == pytest.approx(by_id(ranker.rank([request])[0]), abs=1e-5)


def test_probabilities_that_are_not_finite_are_refused(assets: Assets):
    """Their order would be arbitrary."""
    ranker = Ranker(Bundle.load(assets.bundle), ItemStore.open(assets.store))
    first, second = requests(assets, 2)
    last = second.candidates[-1]
    features = ranker.tokens.features

    def damaged(items: list[str]) -> list[torch.Tensor]:
        return [
            tokens * float("nan") if item == last else tokens
            for item, tokens in zip(items, features(items), strict=True)
        ]

    ranker.tokens.features = damaged  # type: ignore[method-assign]
    with pytest.raises(DataError, match=rf"test.jsonl:{second.conversation.line}: .* not finite"):
        ranker.rank([replace(first, candidates=tuple(i for i in first.candidates if i != last)), second])


def test_a_long_id_fits_into_generated_text(assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Such as a UUID, of which many tokenizers make a token a digit."""
    bundle, store = Bundle.load(assets.bundle), ItemStore.open(assets.store)
    long_id = "4f1c-" * 12 + "0"
    items = [{"id": item, "key": item, "title": "a mug"} for item in (long_id, "B0MN000001")]
    part = write_part(tmp_path, "00000", items, store.lookup(store.ids[:2]))
    write_manifest(tmp_path, bundle.backbone, assets.bundle / "vision_adapter", [part])
    lengths = []

    def generate(*args: object, max_new_tokens: int, **options: object) -> list[Continuation]:
        lengths.append(max_new_tokens)
        return [Continuation(text="", logprob=0.0)]

    monkeypatch.setattr("lavic.recommend.ranking.ranker.generate", generate)
    ranker = Ranker(bundle, ItemStore.open(tmp_path))
    conversation = assets.conversations[0]
    ranker.rank([Request(conversation=conversation, candidates=(long_id, "B0MN000001"))], decode="generate")
    ranker.rank([Request(conversation=conversation, candidates=("B0MN000001",))], decode="generate")
    assert lengths == [len(ranker.encoder.target(long_id)) + 4, 16] and lengths[0] > 30


def test_generated_text_starts_with_the_most_probable_token(assets: Assets):
    bundle, store = Bundle.load(assets.bundle), ItemStore.open(assets.store)
    ranker = Ranker(bundle, store)
    (request,) = requests(assets, 1)
    (answer,) = ranker.rank([request], decode="generate")
    assert answer.text is not None
    # The first token: the most probable one after the prompt.
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
    ("text", "parsed"),
    [
        ("{0}", "{0}"),
        ("I would take {0}, or {1}.", "{0}"),
        ("B0ABCDEFGH is best", "B0ABCDEFGH"),
        ("the red one", None),
        ("", None),
    ],
)
def test_parse_id_from_generated_text(assets: Assets, text: str, parsed: str | None):
    ranker = Ranker(Bundle.load(assets.bundle), ItemStore.open(assets.store))
    listed = assets.conversations[0].candidates[KEY]
    assert ranker._parse_id(text.format(*listed), listed) == (parsed.format(*listed) if parsed else None)
    dotted = [f"{item}.X" for item in listed]  # a store id with a suffix is another id
    assert ranker._parse_id(text.format(*dotted), dotted) == (parsed.format(*dotted) if parsed else None)


def test_long_conversations_are_truncated(assets: Assets):
    ranker = Ranker(Bundle.load(assets.bundle), ItemStore.open(assets.store))
    turns = (Turn("seeker", "I want a red mug"), *[Turn("comment", "Any ideas " * 40)] * 30)
    long = Conversation(id="long", turns=turns, candidates=assets.conversations[0].candidates)
    request = Request(conversation=long, candidates=long.candidates[KEY])
    assert len(ranker.encode(request).prompt) <= 512
    assert len(ranker.rank([request])[0].ids) == 10


def test_candidates_missing_from_the_store_are_named(assets: Assets):
    ranker = Ranker(Bundle.load(assets.bundle), ItemStore.open(assets.store))
    (request,) = requests(assets, 1)
    with pytest.raises(DataError, match=r"test\.jsonl:1: candidate B0NOWHERE0 of 11 is not in the item store"):
        ranker.rank([replace(request, candidates=(*request.candidates, "B0NOWHERE0"))])
