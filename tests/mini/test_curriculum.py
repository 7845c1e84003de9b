"""The lists that a miniature learns to read: what they say, ask, and supervise."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lavic.mini import catalog, curriculum
from lavic.mini.curriculum import LEVELS, PHOTO_LEVELS, Level, Listing
from lavic.model.inputs.label_mask import IGNORED, Batch
from lavic.model.loading import Backbone


def test_lists_supervise_what_they_say(
    mini: Backbone, products: list[catalog.Product], listings: list[Listing]
) -> None:
    rng = random.Random(0)
    words = ["red", "blue", "green", "yellow", "pink", "black", "white", "brown", "orange"]
    ids = [p.id for p in products]
    encoder = mini.encoder
    for level in (*LEVELS, *PHOTO_LEVELS):
        lists = curriculum.make_lookup_batch(
            level, listings, words, ids, encoder, rng, 3 if level.form == "photo" else 0
        )
        labels = lists.batch.labels
        assert len(lists.row) == len(lists.answer) == len(lists.requested) == level.batch * (1 + level.extra_requests)
        torch.testing.assert_close(lists.requested.sum(1), torch.ones(len(lists.row)))
        # an answer begins where its first token is learnt, and the words wanted of it stand in its row
        assert (labels[lists.row, lists.answer] != IGNORED).all()
        assert (labels[lists.row, lists.answer - 1] == IGNORED).all()
        for row, wanted in zip(lists.row.tolist(), lists.requested, strict=True):
            assert set(wanted.nonzero().flatten().tolist()) <= set(lists.batch.input_ids[row].tolist())
        shown = int((lists.batch.input_ids == encoder.image_token_id).sum())
        assert shown == 3 * len(lists.photos)
        assert bool(lists.photos) == (level.form == "photo")
        assert len(lists.looks) == len(lists.photos)
        look_of = {id: look for listing in listings for id, look in zip(listing.ids, listing.looks, strict=True)}
        for id, look in zip(lists.photos, lists.looks, strict=True):
            tokens = encoder.tokenizer(look_of[id], add_special_tokens=False).input_ids
            assert look.nonzero().flatten().tolist() == sorted(tokens) and look.sum() == pytest.approx(1)


def test_ids_of_a_list_may_be_neighbours(mini: Backbone) -> None:
    ids = [f"B0MN{n:06d}" for n in range(0, 90_000, 300)]
    words = ["red", "blue", "green", "yellow", "pink", "black", "white", "brown", "orange"]

    def beginnings(near: float) -> float:
        """How many different first two tokens the answers of a list have, on average."""
        level, rng = Level(form="word", max_items=4, batch=32, extra_requests=3), random.Random(3)
        batches = [
            curriculum.make_lookup_batch(level, (), words, ids, mini.encoder, rng, near=near).batch for _ in range(8)
        ]
        return float(np.mean([len(set(begins)) for batch in batches for begins in starts(batch)]))

    def starts(batch: Batch) -> list[list[tuple[int, ...]]]:
        found = []
        for row, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            at = [i for i, label in enumerate(labels) if label != IGNORED and labels[i - 1] == IGNORED]
            found.append([tuple(row[i : i + 2]) for i in at])
        return found

    assert beginnings(1.0) < beginnings(0.0) - 0.5


@pytest.mark.parametrize(("reach", "ahead", "behind"), [(10, (0.5, 0.8), (0.1, 0.3)), (0, (0, 0), (1, 1))])
def test_a_request_stands_ahead_of_photos_or_behind_them(
    reach: int,
    ahead: tuple[float, float],
    behind: tuple[float, float],
    mini: Backbone,
    products: list[catalog.Product],
    listings: list[Listing],
) -> None:
    rng = random.Random(0)
    level = Level(form="photo", max_items=10, batch=400, max_distance=reach)
    lists = curriculum.make_lookup_batch(level, listings, [], [p.id for p in products], mini.encoder, rng, 1)
    texts = [mini.encoder.tokenizer.decode(row) for row in lists.batch.input_ids]
    assert ahead[0] <= np.mean([text.index("Seeker") < text.index("<image>") for text in texts]) <= ahead[1]
    assert behind[0] <= np.mean([text.index("Seeker") > text.rindex("<image>") for text in texts]) <= behind[1]


def test_a_request_has_one_right_answer(mini: Backbone, products: list[catalog.Product]) -> None:
    """Where candidates share a look, as real ones share a colour, none but the target's is asked for."""
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
            for wanted in lists.requested[lists.row == row]:
                assert (shown == wanted).all(1).sum() == 1
