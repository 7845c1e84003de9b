"""The packaged miniature, drawn products, and lists of ten of them."""

from __future__ import annotations

import random

import pytest

from lavic.mini import catalog
from lavic.mini.catalog import make_products, pick_candidates
from lavic.mini.curriculum import Listing
from lavic.mini.drawing import COLOURS, KINDS, PATTERNS
from lavic.model.config import ModelSettings
from lavic.model.loading import Backbone


@pytest.fixture(scope="package")
def mini() -> Backbone:
    return Backbone.load(ModelSettings(name="mini"))


@pytest.fixture(scope="package")
def products() -> list[catalog.Product]:
    looks = [(k, c, p) for k in KINDS for c in COLOURS for p in PATTERNS]
    return make_products(600, random.Random(11), looks)


@pytest.fixture
def listings(products: list[catalog.Product]) -> list[Listing]:
    rng, listings = random.Random(0), []
    for target in products[:20]:
        listed = pick_candidates(target, products, rng)
        listings.append(
            Listing(
                ids=tuple(p.id for p in listed),
                turns=(("seeker", f"a {target.look_words} {target.kind}"),),
                titles=tuple(p.title for p in listed),
                looks=tuple(p.look_words for p in listed),
                target=listed.index(target),
            )
        )
    return listings
