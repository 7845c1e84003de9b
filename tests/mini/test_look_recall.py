"""look@k against values by hand and random lists."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lavic.errors import DataError
from lavic.mini.catalog import CatalogueSize, write_catalogue
from lavic.mini.look_recall import chance, look_recall, read_looks


def test_an_item_with_the_targets_look_and_kind_counts() -> None:
    looks = {
        "A": ("red", "plain", "mug"),
        "B": ("red", "plain", "mug"),
        "C": ("red", "plain", "hat"),
        "D": ("blue", "plain", "mug"),
    }
    lists = [["D", "B", "A"], ["C", "D"], [], ["A"]]
    targets = ["A", "A", "D", "B"]
    assert look_recall(lists, targets, looks, (1, 2, 3)) == {"look_at_1": 0.25, "look_at_2": 0.5, "look_at_3": 0.5}
    # one of three mugs looks like D, two look like A
    assert chance(["D", "A"], looks, (1, 2, 10)) == {
        "look_at_1": pytest.approx((1 / 3 + 2 / 3) / 2),
        "look_at_2": pytest.approx((2 / 3 + 1) / 2),
        "look_at_10": 1.0,
    }


def test_chance_is_the_mean_of_random_lists_on_a_drawn_catalogue(tmp_path: Path) -> None:
    size = CatalogueSize(
        train_items=80,
        valid_items=20,
        heldout_items=20,
        combination_items=20,
        train_conversations=5,
        valid_conversations=5,
        test_conversations=20,
    )
    write_catalogue(tmp_path, base_url="http://127.0.0.1:1", size=size, seed=3)
    looks = read_looks(tmp_path)
    assert set(looks) == set(json.loads((tmp_path / "item2meta_train.json").read_text()))
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    targets = [row["gt_items"][0] for row in rows]
    for row, target in zip(rows, targets, strict=True):
        assert all(word in row["context"] for word in looks[target])
    rng = random.Random(0)
    of_kind = {id: [other for other in looks if looks[other][2] == looks[id][2]] for id in targets}
    draws = [look_recall([rng.sample(of_kind[id], 10) for id in targets], targets, looks) for _ in range(300)]
    for cut, expected in chance(targets, looks).items():
        assert sum(draw[cut] for draw in draws) / len(draws) == pytest.approx(expected, abs=0.03)


def test_a_folder_without_a_drawn_catalogue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a synthetic catalogue"):
        read_looks(tmp_path)
