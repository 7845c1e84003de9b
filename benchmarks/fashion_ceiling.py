"""How far the labels of `fashion.sh` can be told from the photos at all: colour histograms and a forest, no miniature.

    python benchmarks/fashion_ceiling.py OUT/catalog --images DATA/images

Learns the labelled colour of the base model's photos (looks.jsonl) from histograms of what is not white background.
Says how often it names the labelled colour of photos it has not learnt from, and in how many lists of a split the
candidate that is likeliest to have the colour asked for is the target. That twice: most other candidates of a list are
the base's items, whose colours the forest knows by heart; out of bag they too are judged by trees that have not learnt
them.
Needs scikit-learn, which MLflow brings along.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.ensemble import ExtraTreesClassifier

_WHITE = 235
"""A pixel with no channel below is background."""
_LEVELS = 6
"""Of each channel in a histogram."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog", type=Path, help="the folder that fashion.sh makes of the catalogue")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--split", default="valid", help="the conversations: valid, test or strangers")
    parser.add_argument(
        "--lists", type=int, nargs="*", default=[], help="of the first so many lists; by default of all"
    )
    parser.add_argument("--trees", type=int, default=400)
    chosen = parser.parse_args()
    looks = {row["id"]: row["look"] for row in _rows(chosen.catalog / "looks_all.jsonl")}
    learnt = [row["id"] for row in _rows(chosen.catalog / "looks.jsonl")]
    held = sorted(looks.keys() - set(learnt))
    seen = {id: features(chosen.images / f"{int(id[2:])}.jpg") for id in looks}
    forest = ExtraTreesClassifier(
        chosen.trees, min_samples_leaf=2, max_features=0.1, bootstrap=True, oob_score=True, random_state=0
    )
    forest.fit([seen[id] for id in learnt], [looks[id] for id in learnt])
    said = forest.predict([seen[id] for id in held])
    right = np.mean([colour == looks[id] for colour, id in zip(said, held, strict=True)])
    print(f"labelled colour of {len(held)} photos that the base has not: {right:.3f}")

    column = {colour: number for number, colour in enumerate(forest.classes_)}
    new = dict(zip(held, forest.predict_proba([seen[id] for id in held]), strict=True))
    by_heart = dict(zip(learnt, forest.predict_proba([seen[id] for id in learnt]), strict=True))
    out_of_bag = dict(zip(learnt, forest.oob_decision_function_, strict=True))
    conversations = _rows(chosen.catalog / f"{chosen.split}.jsonl")
    for count in chosen.lists or [len(conversations)]:
        shares = [
            np.mean([_found(row, looks, column, {**new, **known}) for row in conversations[:count]])
            for known in (by_heart, out_of_bag)
        ]
        named = f"targets of the first {min(count, len(conversations))} {chosen.split} lists"
        print(f"{named}: {shares[0]:.3f} with the base's items known by heart, {shares[1]:.3f} out of bag")


def _found(row: dict, looks: dict[str, str], column: dict[str, int], chance: dict[str, np.ndarray]) -> bool:
    """Whether the candidate likeliest to have the colour asked for is the target."""
    asked = column.get(looks[row["gt_items"][0]])
    known = [id for id in row["candidates_st"] if id in chance and asked is not None]
    return bool(known) and max(known, key=lambda id: chance[id][asked]) in row["gt_items"]


def features(path: Path) -> np.ndarray:
    """Colours of a photo: float [552]; the whole foreground's, that of its middle, and six by six pixels."""
    small = Image.open(path).convert("RGB").resize((64, 64))
    pixels = np.asarray(small, np.float32)
    shown = pixels.min(-1) < _WHITE
    middle = (slice(16, 48), slice(16, 48))
    parts = []
    for some in (pixels[shown], pixels[middle][shown[middle]]):
        some = some if len(some) > 20 else pixels.reshape(-1, 3)
        level = (some // (256 / _LEVELS)).astype(int)
        place = (level[:, 0] * _LEVELS + level[:, 1]) * _LEVELS + level[:, 2]
        parts += [np.bincount(place, minlength=_LEVELS**3) / len(some), some.mean(0) / 255, np.median(some, 0) / 255]
    return np.concatenate([*parts, np.asarray(small.resize((6, 6))).ravel() / 255])


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
