"""Prepares the catalogue of real photos for `fashion.sh`: what training may see, and what it may not.

Reads the files that `fashion_catalog.py` wrote into FOLDER and the attribute table, and rewrites in place

  train.jsonl            every candidate that is a target of valid or test is replaced by a training item
  item2meta_valid.jsonl  the photos of those held-out targets, with their descriptions
  item2meta_train.json   every item; held-out ones without description

and adds looks.jsonl (training items) and looks_all.jsonl (every item): an item's colour in words.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections import defaultdict
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--styles", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    folder, rng = chosen.folder, random.Random(chosen.seed)

    with chosen.styles.open(encoding="utf-8") as table:
        colours = {row["id"].zfill(8): row["baseColour"].lower() for row in csv.DictReader(table)}
    meta: dict[str, dict] = json.loads((folder / "item2meta_train.json").read_text(encoding="utf-8"))
    described = {}
    for item in meta.values():
        described.update({name.rsplit("_", 1)[0]: text for name, text in item[DESCRIPTIONS].items()})
    for row in read_lines(folder / "item2meta_valid.jsonl"):
        described[row["image_name"].rsplit("_", 1)[0]] = row["image_description_llava_cleaned"]

    held = {t for name in ("valid", "test") for row in read_lines(folder / f"{name}.jsonl") for t in row["gt_items"]}
    looks = {id: colours[id[2:]] for id in meta if colours[id[2:]] not in ("", "na")}
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for id, item in meta.items():
        if id not in held and id in looks:
            alike[kind(item)].append(id)

    rows, dropped = [], 0
    for row in read_lines(folder / "train.jsonl"):
        target = row["gt_items"][0]
        pool = [id for id in alike[kind(meta[target])] if looks[id] != looks[target] and id not in row["candidates_st"]]
        rng.shuffle(pool)
        listed = [id if id == target or (id in looks and id not in held) else None for id in row["candidates_st"]]
        if listed.count(None) > len(pool):
            dropped += 1
            continue
        row["candidates_st"] = [id or pool.pop() for id in listed]
        rows.append(row)
    write_lines(folder / "train.jsonl", rows)

    valid = []
    for id in sorted(held):
        item, name = meta[id], f"{id}_0.jpg"
        text = described[id]
        item[DESCRIPTIONS] = {}
        valid.append(
            {
                "title": item["title"],
                "image_name": name,
                "image": item["images"][0]["large"],
                "image_description_llava_cleaned": text,
            }
        )
    write_lines(folder / "item2meta_valid.jsonl", valid)
    for id, item in meta.items():
        if id not in held:
            item[DESCRIPTIONS] = {f"{id}_0.jpg": described[id]}
    (folder / "item2meta_train.json").write_text(json.dumps(meta), encoding="utf-8")
    write_lines(folder / "looks.jsonl", [{"id": id, "look": looks[id]} for id in sorted(looks) if id not in held])
    write_lines(folder / "looks_all.jsonl", [{"id": id, "look": look} for id, look in sorted(looks.items())])
    print(f"{len(meta)} items, {len(held)} held out; {len(rows)} training lists, {dropped} dropped for want of items")


DESCRIPTIONS = "image_descriptions_llava_cleaned"


def kind(item: dict) -> tuple[str, str]:
    """Article type and department: what the candidates of a list share."""
    return item["categories"][2], item["details"]["Department"]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
