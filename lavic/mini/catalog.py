"""The synthetic catalogue: products of a kind, a colour and a pattern, and conversations that only photos can answer.

A title names brand, line and kind. The ten candidates of a conversation share the kind, so titles never give the
answer away; the colour and pattern that the conversation asks for are in the photo alone.
"""

from __future__ import annotations

import io
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from lavic.mini.drawing import COLOURS, KINDS, PATTERNS, draw
from lavic.storage.atomic import atomic_open, atomic_write, remove_partial_files

BRANDS = "Acme Nova Orbit Zeta Luna Kito Vega Solis Brio Fern Onyx Pala Quill Rook Sable Tarn Umbra Vale Wren Yarrow"
LINES = "Classic Urban Sport Home Studio Daily Prime Basic Soft Bold"
ID_PREFIX = "B0MN"
"""Every synthetic item's id is this and six digits: ten characters, as an ASIN has."""

LOOKS = list(itertools.product(KINDS, COLOURS, PATTERNS))
"""All combinations of kind, colour and pattern."""

REQUESTS = (
    "I want a {colour} {pattern} {kind}. Any ideas?",
    "Looking for a {kind}, {colour} and {pattern} please.",
    "My old {kind} fell apart. I would love a {pattern} {kind} in {colour}.",
    "Can you recommend a {kind}? It should be {pattern} and {colour}.",
)
COMMENTS = (
    "What do you have in mind?",
    "Take your time with this one.",
    "I bought mine last year.",
    "There are so many of them now.",
)
"""Comments before the answer; they do not help."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """One synthetic item."""

    id: str
    title: str
    kind: str
    colour: str
    pattern: str
    seed: int
    """Draws its photo: `draw(kind, colour, pattern, seed)`."""

    @property
    def look(self) -> tuple[str, str, str]:
        return self.kind, self.colour, self.pattern

    @property
    def photo_name(self) -> str:
        return f"{self.id}_0.jpg"

    @property
    def look_words(self) -> str:
        """Colour and pattern, as a conversation asks for them."""
        return f"{self.colour} {self.pattern}"

    @property
    def description(self) -> str:
        """The reference description of the photo."""
        return f"The photo shows a {self.colour} {self.pattern} {self.kind}."


def held_out_looks(seed: int, count: int = 24) -> frozenset[tuple[str, str, str]]:
    """The `count` combinations of kind, colour and pattern (of 240) that no training photo shows.

    They are the same for every catalogue: a base model that was pretrained with `seed` has not seen them either.
    """
    return frozenset(random.Random(seed).sample(LOOKS, count))


HELD_OUT_SEED = 77
"""Seed of the held-out combinations, the same for pretraining and for every demo catalogue."""


def make_products(count: int, rng: random.Random, looks: list[tuple[str, str, str]]) -> list[Product]:
    """Makes `count` products with looks taken at random from `looks`; ids are unique within the call."""
    numbers = rng.sample(range(1_000_000), count)
    products = []
    for number in numbers:
        kind, colour, pattern = rng.choice(looks)
        title = f"{rng.choice(BRANDS.split())} {rng.choice(LINES.split())} {kind.title()}"
        products.append(
            Product(
                id=f"{ID_PREFIX}{number:06d}",
                title=title,
                kind=kind,
                colour=colour,
                pattern=pattern,
                seed=rng.randrange(2**31),
            )
        )
    return products


def pick_candidates(target: Product, pool: list[Product], rng: random.Random, count: int = 10) -> list[Product]:
    """The target and `count - 1` others of its kind, each with another look, in random order; fewer if the pool has
    fewer looks.

    Two share the target's colour and two its pattern (where the list is long enough), so that neither alone decides.
    """
    same_kind = [product for product in pool if product.kind == target.kind]
    rng.shuffle(same_kind)
    used_looks = {target.look}
    chosen: list[Product] = []

    def take(limit: int, colour: str | None = None, pattern: str | None = None) -> None:
        for product in same_kind:
            if len(chosen) >= limit:
                return
            if (
                product.look not in used_looks
                and colour in (None, product.colour)
                and pattern in (None, product.pattern)
            ):
                used_looks.add(product.look)
                chosen.append(product)

    similar = min(2, (count - 1) // 3)
    take(similar, colour=target.colour)
    take(2 * similar, pattern=target.pattern)
    take(count - 1)
    chosen.append(target)
    rng.shuffle(chosen)
    return chosen


def make_conversation(target: Product, rng: random.Random) -> str:
    """A conversation that asks for the target's look, with the tags of the released data."""
    request = rng.choice(REQUESTS).format(kind=target.kind, colour=target.colour, pattern=target.pattern)
    comments = rng.sample(COMMENTS, rng.choice((0, 0, 1)))
    return f"<submission>{request}</submission>\n" + "".join(f"<comment>{c}</comment>\n" for c in comments)


def conversation_row(target: Product, pool: list[Product], rng: random.Random) -> dict:
    """One row of the released Reddit-Amazon form."""
    return {
        "context": make_conversation(target, rng),
        "context_items": [],
        "gt": f"This one: https://www.amazon.com/dp/{target.id}",
        "gt_items": [target.id],
        "candidates_st": [p.id for p in pick_candidates(target, pool, rng)],
    }


@dataclass(frozen=True, kw_only=True)
class CatalogueSize:
    """Numbers of items and conversations."""

    train_items: int = 1300
    valid_items: int = 120
    """Items for validating stage 2, which no stage trains on, with looks that training shows."""
    heldout_items: int = 200
    """Test items, which no stage trains on or validates with, with looks that training shows."""
    combination_items: int = 200
    """Test items whose look (kind, colour and pattern together) no training photo shows."""
    train_conversations: int = 6000
    valid_conversations: int = 200
    test_conversations: int = 400
    """Conversations about held-out items, and as many about held-out combinations."""


def write_catalogue(out: Path, *, base_url: str, size: CatalogueSize, seed: int) -> dict[str, int]:
    """Writes photos, metadata and conversations into `out`; photos are named in URLs below `base_url`.

    `images/`, `item2meta_train.json` (every item), `item2meta_valid.jsonl` (the photos that stage 1 does not train on,
    with descriptions), `meta_Mini.jsonl` (Amazon Reviews 2023 form), `looks.jsonl` (colour and pattern of the training
    items in words, for `lavic mini pretrain`), `train|valid|test|test_combinations.jsonl` (conversations). Each is
    written atomically, `test_combinations.jsonl` last.

    Returns:
        The number of items, and of the rows of each file.
    """
    rng = random.Random(seed)
    unseen = held_out_looks(HELD_OUT_SEED)
    seen = [look for look in LOOKS if look not in unseen]
    counts = (size.train_items, size.heldout_items, size.combination_items)
    products = make_products(counts[0] + counts[1], rng, seen)
    train, heldout = products[: counts[0]], products[counts[0] :]
    used_ids = {p.id for p in products}
    combinations = [p for p in make_products(2 * counts[2], rng, sorted(unseen)) if p.id not in used_ids][: counts[2]]
    used_ids |= {p.id for p in combinations}
    # A separate generator: training and test do not depend on the number of validation items.
    valid_rng = random.Random(f"valid {seed}")
    valid = [p for p in make_products(2 * size.valid_items, valid_rng, seen) if p.id not in used_ids][
        : size.valid_items
    ]

    (out / "images").mkdir(parents=True, exist_ok=True)
    remove_partial_files(out / "images")
    for p in (*train, *valid, *heldout, *combinations):
        photo = io.BytesIO()  # into memory: Pillow does not notice a short write to a file on a full disk
        draw(p.kind, p.colour, p.pattern, p.seed).save(photo, "JPEG", quality=92, subsampling=0)
        with atomic_open(out / "images" / p.photo_name, durable=False) as file:
            file.write(photo.getbuffer())

    held = [*valid, *heldout, *combinations]
    meta = {p.id: _lavic_meta(p, base_url, described=p not in held) for p in (*train, *held)}
    atomic_write(out / "item2meta_train.json", json.dumps(meta))
    rows: dict[str, list[dict]] = {
        "item2meta_valid": [_lavic_valid(p, base_url) for p in held],
        "looks": [{"id": p.id, "look": p.look_words} for p in train],
        "meta_Mini": [_amazon_meta(p, base_url) for p in (*train, *held)],
        "train": [conversation_row(rng.choice(train), train, rng) for _ in range(size.train_conversations)],
        "valid": [conversation_row(valid_rng.choice(valid), valid, valid_rng) for _ in range(size.valid_conversations)],
        "test": [conversation_row(heldout[i % len(heldout)], heldout, rng) for i in range(size.test_conversations)],
        "test_combinations": [
            conversation_row(combinations[i % len(combinations)], [*heldout, *combinations], rng)
            for i in range(size.test_conversations)
        ],
    }
    for name, lines in rows.items():
        atomic_write(out / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in lines))
    return {"items": len(meta), **{name: len(lines) for name, lines in rows.items()}}


def _lavic_meta(p: Product, base_url: str, *, described: bool) -> dict:
    return {
        "title": p.title,
        "categories": ["Drawn", p.kind],
        "features": [],
        "description": [],
        "details": {},
        "images": [{"large": f"{base_url}/{p.photo_name}", "variant": "MAIN"}],
        "image_descriptions_llava_cleaned": {p.photo_name: p.description} if described else {},
    }


def _lavic_valid(p: Product, base_url: str) -> dict:
    return {
        "title": p.title,
        "image_name": p.photo_name,
        "image": f"{base_url}/{p.photo_name}",
        "image_description_llava_cleaned": p.description,
    }


def _amazon_meta(p: Product, base_url: str) -> dict:
    url = f"{base_url}/{p.photo_name}"
    return {
        "main_category": "DRAWN",
        "title": p.title,
        "average_rating": None,
        "rating_number": 0,
        "features": [],
        "description": [],
        "price": None,
        "images": [{"hi_res": None, "large": url, "thumb": url, "variant": "MAIN"}],
        "videos": [],
        "store": p.title.split()[0],
        "categories": ["Drawn", p.kind],
        "details": "{}",
        "parent_asin": p.id,
        "bought_together": None,
    }
