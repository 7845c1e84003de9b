"""Prepares the catalogue of real photos for `fashion.sh`: what training may see, and what it may not.

Reads the files that `fashion_catalog.py` wrote into FOLDER, the attribute table and the photos. Held out are the
targets of valid and test, and every item whose photo is that of one of them to the byte. Of the training items a part
is the base model's own: these it is pretrained on, the others it first meets in stage 1, as LLaVA meets a catalogue.
Rewrites in place

  train.jsonl            every candidate that is held out is replaced by a training item
  item2meta_train.json   the items that are not held out; those of the base model with descriptions
  item2meta_valid.jsonl  the photos of the targets of valid, with their descriptions

and adds

  base.jsonl             the lists of train.jsonl whose target is the base model's, its other items replaced too
  item2meta_test.json    the other items that are held out, without descriptions
  strangers.jsonl        the conversations of test whose other candidates can all be held-out items too
  looks.jsonl            an item's colour in words, of the training items
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
    unseen = {photo[id] for ids in targets.values() for id in ids}
    held = {id for id in meta if photo[id] in unseen}
    looks = {id: colours[id[2:]] for id in meta if colours[id[2:]] not in ("", "na")}
    kinds = defaultdict(list)
    for id in sorted(looks):
        kinds[kind(meta[id])].append(id)

    def among(allowed: set[str], row: dict) -> dict | None:
        """The list with every item replaced that is not allowed; None where the items of its kind do not suffice."""
        target, listed = row["gt_items"][0], row["candidates_st"]
        kept = [id if id == target or (id in looks and id in allowed) else None for id in listed]
        others = [id for id in kinds[kind(meta[target])] if id in allowed and id not in listed]
        pool = [id for id in others if looks[id] != looks[target]]
        rng.shuffle(pool)
        return {**row, "candidates_st": [id or pool.pop() for id in kept]} if kept.count(None) <= len(pool) else None

    given = read_lines(folder / "train.jsonl")
    rows = [row for row in (among(meta.keys() - held, row) for row in given) if row]
    write_lines(folder / "train.jsonl", rows)

    strangers = []
    for row in read_lines(folder / "test.jsonl"):
        target = row["gt_items"][0]
        pool = [id for id in kinds[kind(meta[target])] if id in held and looks[id] != looks[target]]
        if len(pool) >= 9:
            row["candidates_st"] = rng.sample([target, *rng.sample(pool, 9)], 10)
            strangers.append(row)
    write_lines(folder / "strangers.jsonl", strangers)

    photos = sorted({photo[id] for id in meta.keys() - held})
    shown = set(rng.sample(photos, round(BASE * len(photos))))
    base = {id for id in meta.keys() - held if photo[id] in shown}
    known = [row for row in (among(base, row) for row in rows if row["gt_items"][0] in base) if row]
    write_lines(folder / "base.jsonl", known)

    valid = [
        {
            "title": meta[id]["title"],
            "image_name": f"{id}_0.jpg",
            "image": meta[id]["images"][0]["large"],
            "image_description_llava_cleaned": described[id],
        }
        for id in sorted(targets["valid"])
    ]
    write_lines(folder / "item2meta_valid.jsonl", valid)
    for id, item in meta.items():
        item[DESCRIPTIONS] = {f"{id}_0.jpg": described[id]} if id in base else {}
    for name, ids in (("train", meta.keys() - held), ("test", held - targets["valid"])):
        items = {id: item for id, item in meta.items() if id in ids}
        (folder / f"item2meta_{name}.json").write_text(json.dumps(items), encoding="utf-8")
    write_lines(folder / "looks.jsonl", [{"id": id, "look": looks[id]} for id in sorted(looks) if id not in held])
    write_lines(folder / "looks_all.jsonl", [{"id": id, "look": look} for id, look in sorted(looks.items())])
    print(
        f"{len(meta)} items, {len(held)} held out, {len(base)} the base model's; {len(rows)} training lists, "
        f"{len(given) - len(rows)} dropped for want of items, {len(known)} for the base model; "
        f"{len(strangers)} test lists of held-out items alone"
    )


DESCRIPTIONS = "image_descriptions_llava_cleaned"
BASE = 0.75
"""Share of the training photos that the base model is pretrained on."""


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
