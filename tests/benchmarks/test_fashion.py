"""What `benchmarks/fashion.sh` may learn from: its catalogue, cut into what is held out and what is not."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fashion_catalogue.py"
VALID, TEST, TWIN = range(1, 3), range(3, 15), 40
"""Targets of validation and of test among 40 shirts in 13 colours, and the item whose photo is that of a target."""


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
    colours = {number: f"colour {number % 13}" for number in range(1, 41)}
    with (folder / "styles.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["id", "baseColour"])
        writer.writerows(colours.items())
    meta, valid = {}, []
    for number in colours:
        photo = f"{name(number)}_0.jpg"
        (folder / "images" / f"{number}.jpg").write_bytes(b"photo %d" % (TEST[0] if number == TWIN else number))
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
    for split, targets in (("train", range(15, 40)), ("valid", VALID), ("test", TEST)):
        rows = []
        for target in targets:
            others = [n for n in colours if colours[n] != colours[target]]
            rows.append({"gt_items": [name(target)], "candidates_st": [name(n) for n in (*others[:9], target)]})
        write(folder / f"{split}.jsonl", rows)
    words = [sys.executable, SCRIPT, folder, "--styles", folder / "styles.csv", "--images", folder / "images"]
    subprocess.run(words, check=True, capture_output=True)
    return folder


def held() -> set[str]:
    return {name(number) for number in (*VALID, *TEST, TWIN)}


def test_what_is_held_out_is_in_no_training_list(catalogue: Path) -> None:
    rows = read(catalogue / "train.jsonl")
    assert len(rows) == 25
    for row in rows:
        assert not held() & set(row["candidates_st"])
        assert len(set(row["candidates_st"])) == 10 and row["gt_items"][0] in row["candidates_st"]
    assert not held() & {row["id"] for row in read(catalogue / "looks.jsonl")}


def test_every_photo_is_in_one_set_and_a_twin_of_a_target_is_held_out(catalogue: Path) -> None:
    train, test = (json.loads((catalogue / f"item2meta_{split}.json").read_text()) for split in ("train", "test"))
    valid = {row["image_name"][:-6] for row in read(catalogue / "item2meta_valid.jsonl")}
    assert valid == {name(number) for number in VALID}
    assert train.keys() == {name(n) for n in range(1, 41)} - held()
    assert test.keys() == held() - valid and name(TWIN) in test
    assert not any(item["image_descriptions_llava_cleaned"] for item in test.values())


def test_the_base_model_is_shown_a_part_of_the_training_items(catalogue: Path) -> None:
    train = json.loads((catalogue / "item2meta_train.json").read_text())
    base = {id for id, item in train.items() if item["image_descriptions_llava_cleaned"]}
    assert len(base) == round(0.75 * len(train))
    rows = read(catalogue / "base.jsonl")
    assert {row["gt_items"][0] for row in rows} == base
    for row in rows:
        assert set(row["candidates_st"]) <= base
        assert len(set(row["candidates_st"])) == 10 and row["gt_items"][0] in row["candidates_st"]
    others = {id for row in read(catalogue / "train.jsonl") for id in row["candidates_st"]} - base
    assert others <= train.keys() and len(others) > 2


def test_strangers_are_all_held_out(catalogue: Path) -> None:
    looks = {row["id"]: row["look"] for row in read(catalogue / "looks_all.jsonl")}
    rows = read(catalogue / "strangers.jsonl")
    assert rows
    for row in rows:
        (target,) = row["gt_items"]
        assert set(row["candidates_st"]) <= held() and len(set(row["candidates_st"])) == 10
        assert [looks[id] for id in row["candidates_st"]].count(looks[target]) == 1
