"""Training lists of a miniature: their requests, answers and labels."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lavic.mini import catalog, curriculum
from lavic.mini.curriculum import LEVELS, PHOTO_LEVELS, Level, Listing
from lavic.model.inputs.label_mask import IGNORED, Batch
from lavic.model.loading import Backbone

pytestmark = pytest.mark.slow


def test_labels_and_requested_words_match_the_lists(
    mini: Backbone, products: list[catalog.Product], listings: list[Listing]
) -> None:
    rng = random.Random(0)
    vocabulary = ["red", "blue", "green", "yellow", "pink", "black", "white", "brown", "orange"]
    ids = [p.id for p in products]
    encoder = mini.encoder
    for level in (*LEVELS, *PHOTO_LEVELS):
        lists = curriculum.make_lookup_batch(
            level, listings, vocabulary, ids, encoder, rng, 3 if level.form == "photo" else 0
        )
        labels = lists.batch.labels
        assert len(lists.row) == len(lists.answer) == len(lists.requested) == level.batch * (1 + level.extra_requests)
        torch.testing.assert_close(lists.requested.sum(1), torch.ones(len(lists.row)))
        # an answer starts at its first labelled token, and the requested words are in its row
        assert (labels[lists.row, lists.answer] != IGNORED).all()
        assert (labels[lists.row, lists.answer - 1] == IGNORED).all()
        for row, requested in zip(lists.row.tolist(), lists.requested, strict=True):
            assert set(requested.nonzero().flatten().tolist()) <= set(lists.batch.input_ids[row].tolist())
        shown = int((lists.batch.input_ids == encoder.image_token_id).sum())
        assert shown == 3 * len(lists.photos)
        assert bool(lists.photos) == (level.form == "photo")
        assert len(lists.looks) == len(lists.photos)
        look_of = {id: look for listing in listings for id, look in zip(listing.ids, listing.looks, strict=True)}
        for id, weights in zip(lists.photos, lists.looks, strict=True):
            tokens = encoder.tokenizer(look_of[id], add_special_tokens=False).input_ids
            assert weights.nonzero().flatten().tolist() == sorted(tokens) and weights.sum() == pytest.approx(1)


def test_near_draws_ids_with_shared_prefixes(mini: Backbone) -> None:
    ids = [f"B0MN{n:06d}" for n in range(0, 90_000, 300)]
    vocabulary = ["red", "blue", "green", "yellow", "pink", "black", "white", "brown", "orange"]

    def distinct_prefixes(near: float) -> float:
        """The mean number of distinct two-token prefixes of the answers in a list."""
        level, rng = Level(form="word", max_items=4, batch=32, extra_requests=3), random.Random(3)
        batches = [
            curriculum.make_lookup_batch(level, (), vocabulary, ids, mini.encoder, rng, neighbor_share=near).batch
            for _ in range(8)
        ]
        return float(np.mean([len(set(row_prefixes)) for batch in batches for row_prefixes in answer_prefixes(batch)]))

    def answer_prefixes(batch: Batch) -> list[list[tuple[int, ...]]]:
        prefixes = []
        for row, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            positions = [i for i, label in enumerate(labels) if label != IGNORED and labels[i - 1] == IGNORED]
            prefixes.append([tuple(row[i : i + 2]) for i in positions])
        return prefixes

    assert distinct_prefixes(1.0) < distinct_prefixes(0.0) - 0.5


@pytest.mark.parametrize(("reach", "before", "after"), [(10, (0.5, 0.8), (0.1, 0.3)), (0, (0, 0), (1, 1))])
def test_reach_places_the_request_before_or_after_the_photos(
    reach: int,
    before: tuple[float, float],
    after: tuple[float, float],
    mini: Backbone,
    products: list[catalog.Product],
    listings: list[Listing],
) -> None:
    rng = random.Random(0)
    level = Level(form="photo", max_items=10, batch=400, max_distance=reach)
    lists = curriculum.make_lookup_batch(level, listings, [], [p.id for p in products], mini.encoder, rng, 1)
    texts = [mini.encoder.tokenizer.decode(row) for row in lists.batch.input_ids]
    assert before[0] <= np.mean([text.index("Seeker") < text.index("<image>") for text in texts]) <= before[1]
    assert after[0] <= np.mean([text.index("Seeker") > text.rindex("<image>") for text in texts]) <= after[1]


def test_a_request_fits_one_candidate_only(mini: Backbone, products: list[catalog.Product]) -> None:
    """If candidates share a look, the request asks for the target's look only."""
    listing = Listing(
        ids=tuple("abcd"),
        turns=(("seeker", "a red bag"),),
        titles=("bag",) * 4,
        looks=("red", "blue", "blue", "green"),
        target=0,
    )
    level = Level(form="photo", max_items=4, batch=64, extra_requests=4)
    for seed in range(8):
        lists = curriculum.make_lookup_batch(
            level, [listing], [], [p.id for p in products], mini.encoder, random.Random(seed), 1
        )
        for row in range(level.batch):
            shown = lists.looks.view(level.batch, -1, lists.looks.shape[1])[row]
            for requested in lists.requested[lists.row == row]:
                assert (shown == requested).all(1).sum() == 1
