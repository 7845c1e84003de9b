"""What `benchmarks/fashion.sh` may learn from: its catalogue, cut into what is held out and what is not."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fashion_catalogue.py"
PIPELINE = SCRIPT.with_name("fashion.sh")
VALID, TEST, TWINS = range(1, 12), range(12, 23), {59: 1, 60: 12, 11: 12}
"""Targets of validation and of test among 60 shirts in 13 colours, and the items whose photo is that of a target:
the last of validation's own has one of test's."""


def name(number: int) -> str:
    return f"BF{number:08d}"


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    (folder / "images").mkdir()
    colours = {number: f"colour {number % 13}" for number in range(1, 61)}
    with (folder / "styles.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["id", "baseColour"])
        writer.writerows(colours.items())
    meta, valid = {}, []
    for number in colours:
        photo = f"{name(number)}_0.jpg"
        (folder / "images" / f"{number}.jpg").write_bytes(b"photo %d" % TWINS.get(number, number))
        meta[name(number)] = {
            "title": "Shirt",
            "categories": ["Apparel", "Topwear", "Shirts"],
            "details": {"Department": "Men"},
            "images": [{"large": f"http://127.0.0.1:1/{number}.jpg"}],
            "image_descriptions_llava_cleaned": {photo: f"number {number}"} if number % 10 else {},
        }
        if number % 10 == 0:
            valid.append({"image_name": photo, "image_description_llava_cleaned": f"number {number}"})
    (folder / "item2meta_train.json").write_text(json.dumps(meta))
    write(folder / "item2meta_valid.jsonl", valid)
    for split, targets in (("train", range(23, 59)), ("valid", VALID), ("test", TEST)):
        rows = []
        for target in targets:
            others = [n for n in colours if colours[n] != colours[target]]
            rows.append({"gt_items": [name(target)], "candidates_st": [name(n) for n in (*others[:9], target)]})
        write(folder / f"{split}.jsonl", rows)
    words = [sys.executable, SCRIPT, folder, "--styles", folder / "styles.csv", "--images", folder / "images"]
    subprocess.run(words, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def sets(catalogue: Path) -> dict[str, set[str]]:
    """The ids of each part."""
    train, test = (json.loads((catalogue / f"item2meta_{split}.json").read_text()) for split in ("train", "test"))
    base = {id for id, item in train.items() if item["image_descriptions_llava_cleaned"]}
    assert not any(item["image_descriptions_llava_cleaned"] for item in test.values())
    valid = {row["image_name"][:-6] for row in read(catalogue / "item2meta_valid.jsonl")}
    return {"base": base, "new": train.keys() - base, "valid": valid, "test": set(test)}


def test_every_item_is_in_one_set_with_the_twins_of_its_photo(catalogue: Path, sets: dict[str, set[str]]) -> None:
    assert sorted(id for ids in sets.values() for id in ids) == [name(n) for n in range(1, 61)]
    assert sets["base"] == {name(n) for n in range(23, 59)}
    assert {row["id"] for row in read(catalogue / "looks.jsonl")} == sets["base"]
    assert sets["test"] >= {name(n) for n in (*TEST, 60, 11)}
    assert len(sets["valid"]) == 3 and sets["valid"] <= {name(n) for n in VALID}
    # its photo is that of the first target of validation
    assert name(59) in (sets["new"] if name(1) in sets["new"] else sets["test"])


@pytest.mark.parametrize(("lists", "may"), [("base", {"base"}), ("train", {"base", "new"})])
def test_what_is_held_out_is_in_no_training_list(
    catalogue: Path, sets: dict[str, set[str]], lists: str, may: set[str]
) -> None:
    looks = {row["id"]: row["look"] for row in read(catalogue / "looks_all.jsonl")}
    allowed = {id for part in may for id in sets[part]}
    for row in read(catalogue / f"{lists}.jsonl"):
        (target,) = row["gt_items"]
        assert set(row["candidates_st"]) <= allowed
        assert len(set(row["candidates_st"])) == 10 and target in row["candidates_st"]
        assert [looks[id] for id in row["candidates_st"]].count(looks[target]) == 1


def test_a_quarter_of_the_training_lists_asks_for_what_the_base_has_not_seen(
    catalogue: Path, sets: dict[str, set[str]]
) -> None:
    targets = [row["gt_items"][0] for row in read(catalogue / "train.jsonl")]
    new = [id for id in targets if id in sets["new"]]
    assert len(new) == 7 and len(targets) == 28
    assert {row["gt_items"][0] for row in read(catalogue / "valid.jsonl")} == sets["valid"]


def test_strangers_are_all_held_out(catalogue: Path, sets: dict[str, set[str]]) -> None:
    looks = {row["id"]: row["look"] for row in read(catalogue / "looks_all.jsonl")}
    rows = read(catalogue / "strangers.jsonl")
    assert rows
    for row in rows:
        (target,) = row["gt_items"]
        assert set(row["candidates_st"]) <= sets["valid"] | sets["test"] and len(set(row["candidates_st"])) == 10
        assert [looks[id] for id in row["candidates_st"]].count(looks[target]) == 1


@pytest.mark.parametrize("missing", ["DATA", "FASHION_CATALOG"])
def test_the_pipeline_names_the_input_that_is_missing(tmp_path: Path, missing: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "styles.csv").touch()
    env = {name: value for name, value in os.environ.items() if not name.startswith("FASHION_")}
    data = [] if missing == "DATA" else [tmp_path]
    done = subprocess.run(["bash", PIPELINE, *data], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1
    assert f"{missing} ''" in done.stderr
