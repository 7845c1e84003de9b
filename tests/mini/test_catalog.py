"""The synthetic catalogue: only the photos show the looks, in the file formats of the real data."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lavic.data.catalog import read_items
from lavic.data.conversations import read_conversations
from lavic.mini.catalog import (
    HELD_OUT_SEED,
    CatalogueSize,
    held_out_looks,
    make_products,
    pick_candidates,
    write_catalogue,
)
from lavic.mini.drawing import COLOURS, KINDS, PATTERNS, draw

SIZE = CatalogueSize(
    train_items=120,
    valid_items=120,
    heldout_items=120,
    combination_items=120,
    train_conversations=50,
    valid_conversations=5,
    test_conversations=30,
)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    write_catalogue(folder, base_url="http://127.0.0.1:1", size=SIZE, seed=3)
    return folder


def test_both_catalogue_formats_hold_the_same_items(catalogue: Path) -> None:
    lavic = {i.id: i for i in read_items([catalogue / "item2meta_train.json"])}
    amazon = {i.id: i for i in read_items([catalogue / "meta_Mini.jsonl"])}
    assert lavic.keys() == amazon.keys() and len(lavic) == 480
    for id, item in lavic.items():
        assert (item.title, item.images) == (amazon[id].title, amazon[id].images)
        with Image.open(catalogue / "images" / f"{id}_0.jpg") as photo:
            assert photo.size == (96, 96)


def test_held_out_items_are_described_for_validation_only(catalogue: Path) -> None:
    train = {i.id for i in read_items([catalogue / "item2meta_train.json"]) if i.descriptions}
    valid = {i.id for i in read_items([catalogue / "item2meta_valid.jsonl"]) if i.descriptions}
    assert len(train) == 120 and len(valid) == 360
    assert not train & valid
    looks = [json.loads(line)["id"] for line in (catalogue / "looks.jsonl").open()]
    assert set(looks) == train


@pytest.mark.parametrize("name", ["train", "valid", "test", "test_combinations"])
def test_titles_do_not_reveal_the_target(catalogue: Path, name: str) -> None:
    items = {i.id: i for i in read_items([catalogue / "item2meta_train.json"])}
    look_words = {*COLOURS, *PATTERNS}
    for conversation in read_conversations(catalogue / f"{name}.jsonl", candidates="candidates_st"):
        listed = conversation.candidates["candidates_st"]
        assert len(set(listed)) == 10
        assert conversation.targets[0] in listed
        titles = [items[id].title.lower().split() for id in listed]
        assert len({title[-1] for title in titles}) == 1  # one kind
        assert not any(look_words & set(title) for title in titles)


def test_test_targets_are_never_training_items(catalogue: Path) -> None:
    train = {json.loads(line)["id"] for line in (catalogue / "looks.jsonl").open()}
    for name in ("valid", "test", "test_combinations"):
        for conversation in read_conversations(catalogue / f"{name}.jsonl"):
            assert not train & {*conversation.targets, *conversation.candidates["candidates_st"]}


def test_validation_and_test_share_no_items(catalogue: Path) -> None:
    listed = {
        name: {id for c in read_conversations(catalogue / f"{name}.jsonl") for id in c.candidates["candidates_st"]}
        for name in ("valid", "test", "test_combinations")
    }
    assert not listed["valid"] & (listed["test"] | listed["test_combinations"])


def test_valid_items_change_neither_training_nor_test(catalogue: Path, tmp_path: Path) -> None:
    write_catalogue(tmp_path, base_url="http://127.0.0.1:1", size=replace(SIZE, valid_items=60), seed=3)
    for name in ("train", "test", "test_combinations"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (catalogue / f"{name}.jsonl").read_bytes()


def test_held_out_combinations_are_not_in_training_photos() -> None:
    unseen = held_out_looks(HELD_OUT_SEED)
    assert len(unseen) == 24
    assert {k for k, _, _ in unseen} <= set(KINDS)
    seen = [(k, c, p) for k in KINDS for c in COLOURS for p in PATTERNS if (k, c, p) not in unseen]
    assert len(seen) == 216


def test_candidates_have_different_looks_close_to_the_targets() -> None:
    rng = random.Random(0)
    looks = [(k, c, p) for k in KINDS for c in COLOURS for p in PATTERNS]
    products = make_products(2000, rng, looks)
    assert len({p.id for p in products}) == 2000
    for target in products[:50]:
        listed = pick_candidates(target, products, rng)
        assert len({p.look for p in listed}) == 10
        assert sum(p.colour == target.colour for p in listed) >= 3
        assert sum(p.pattern == target.pattern for p in listed) >= 3


def test_drawing_is_deterministic_by_seed() -> None:
    first, second = draw("bag", "red", "dotted", 5), draw("bag", "red", "dotted", 5)
    assert first.tobytes() == second.tobytes() != draw("bag", "red", "dotted", 6).tobytes()


def test_a_truncated_photo_is_not_stored_on_a_full_disk(tmp_path: Path) -> None:
    """A file size limit one byte below the largest photo truncates a write as a full disk does."""
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from lavic.mini.catalog import CatalogueSize, write_catalogue\n"
        "out, limit = Path(sys.argv[1]), int(sys.argv[2])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "write_catalogue(out, base_url='http://127.0.0.1:1', size=CatalogueSize(train_items=30), seed=3)\n"
    )
    size = replace(SIZE, train_items=30)
    write_catalogue(tmp_path / "complete", base_url="http://127.0.0.1:1", size=size, seed=3)
    largest = max(path.stat().st_size for path in (tmp_path / "complete" / "images").iterdir())
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "cut", str(largest - 1)], capture_output=True)
    assert result.returncode != 0 and b"File too large" in result.stderr
    for path in (tmp_path / "cut" / "images").glob("[!.]*"):
        with Image.open(path) as photo:
            photo.load()
