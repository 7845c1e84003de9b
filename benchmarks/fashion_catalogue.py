"""Prepares the catalogue of real photos for `fashion.sh`: what training may see, and what it may not.

Reads the files that the converter FASHION_CATALOG wrote into FOLDER, the attribute table and the photos, and splits
the items:

  the base's   all that are no target of valid or test: the base model is pretrained on these
  new          most of the targets of valid: in training, but unknown to the base model, as a catalogue is to LLaVA.
               A base that has every photo by heart leaves stage 2 little to learn about photos that it has not
  held out     the other targets of valid, and those of test

An item whose photo is that of a target to the byte is new or held out with it. Rewrites in place

  train.jsonl            one list in four asks for a new item, among base and new ones; the others are the base's alone
  valid.jsonl            the lists whose target is held out, and its photo none of test
  item2meta_train.json   the base's items, with descriptions, and the new ones, without
  item2meta_valid.jsonl  the photos of these targets, with their descriptions

and adds

  base.jsonl             all lists of the base's items alone
  item2meta_test.json    the other items that are held out, without descriptions
  strangers.jsonl        the conversations of test whose other candidates can all be held-out items too
  looks.jsonl            an item's colour in words, of the base's items
  looks_all.jsonl        the same of every item
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
from collections import defaultdict
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--styles", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
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

    targets = {
        name: {target for row in read_lines(folder / f"{name}.jsonl") for target in row["gt_items"]}
        for name in ("valid", "test")
    }
    photo = {id: digest(chosen.images / f"{int(id[2:])}.jpg") for id in meta}
    shown = {name: {photo[id] for id in ids} for name, ids in targets.items()}
    base = {id for id in meta if photo[id] not in shown["valid"] | shown["test"]}
    looks = {id: colours[id[2:]] for id in meta if colours[id[2:]] not in ("", "na")}
    kinds = defaultdict(list)
    for id in sorted(looks):
        kinds[kind(meta[id])].append(id)

    def among(row: dict, *allowed: set[str]) -> dict | None:
        """The list with every item replaced that is in none of the sets, by one of its kind out of the last that has
        any; None where they do not suffice."""
        target, listed = row["gt_items"][0], row["candidates_st"]
        kept = [id if id == target or (id in looks and any(id in ids for ids in allowed)) else None for id in listed]
        pool: list[str] = []
        for ids in allowed:
            others = [id for id in kinds[kind(meta[target])] if id in ids and id not in listed]
            others = [id for id in others if looks[id] != looks[target]]
            rng.shuffle(others)
            pool += others
        return {**row, "candidates_st": [id or pool.pop() for id in kept]} if kept.count(None) <= len(pool) else None

    given = read_lines(folder / "train.jsonl")
    # a target of its own may be the twin of one that is held out
    known = [own for row in given if (own := among(row, base)) and row["gt_items"][0] in base]
    write_lines(folder / "base.jsonl", known)

    fresh = sorted(shown["valid"] - shown["test"])
    fresh = set(rng.sample(fresh, round(NEW * len(fresh))))
    new = {id for id in meta if photo[id] in fresh}
    held = meta.keys() - base - new
    chooses = {id for id in targets["valid"] & held if photo[id] not in shown["test"]}

    valid = read_lines(folder / "valid.jsonl")
    asked = [row for row in (among(row, base, new) for row in valid if row["gt_items"][0] in new) if row]
    rows = asked + rng.sample(known, min(len(known), 3 * len(asked)))
    rng.shuffle(rows)
    write_lines(folder / "train.jsonl", rows)
    write_lines(folder / "valid.jsonl", [row for row in valid if row["gt_items"][0] in chooses])

    strangers = []
    for row in read_lines(folder / "test.jsonl"):
        target = row["gt_items"][0]
        pool = [id for id in kinds[kind(meta[target])] if id in held and looks[id] != looks[target]]
        if len(pool) >= 9:
            row["candidates_st"] = rng.sample([target, *rng.sample(pool, 9)], 10)
            strangers.append(row)
    write_lines(folder / "strangers.jsonl", strangers)

    described_valid = [
        {
            "title": meta[id]["title"],
            "image_name": f"{id}_0.jpg",
            "image": meta[id]["images"][0]["large"],
            "image_description_llava_cleaned": described[id],
        }
        for id in sorted(chooses)
    ]
    write_lines(folder / "item2meta_valid.jsonl", described_valid)
    for id, item in meta.items():
        item[DESCRIPTIONS] = {f"{id}_0.jpg": described[id]} if id in base else {}
    for name, ids in (("train", base | new), ("test", held - chooses)):
        items = {id: item for id, item in meta.items() if id in ids}
        (folder / f"item2meta_{name}.json").write_text(json.dumps(items), encoding="utf-8")
    write_lines(folder / "looks.jsonl", [{"id": id, "look": looks[id]} for id in sorted(looks) if id in base])
    write_lines(folder / "looks_all.jsonl", [{"id": id, "look": look} for id, look in sorted(looks.items())])
    print(
        f"{len(meta)} items: {len(base)} the base model's, {len(new)} new, {len(held)} held out; {len(rows)} training "
        f"lists, {len(asked)} with a new target; {len(known)} lists for the base model; {len(strangers)} test lists of "
        "held-out items alone"
    )


DESCRIPTIONS = "image_descriptions_llava_cleaned"
NEW = 0.7
"""Share of valid's targets that training has and the base model has not."""


def kind(item: dict) -> tuple[str, str]:
    """Article type and department: what the candidates of a list share."""
    return item["categories"][2], item["details"]["Department"]


def digest(path: Path) -> bytes:
    """Tells whether two photos are the same to the byte."""
    return hashlib.sha256(path.read_bytes()).digest()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
