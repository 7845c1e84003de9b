"""All stages on a model folder, from the packaged settings of the 7B model, on a few drawn photos."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lavic.data.tar_shards import Sample
from lavic.mini.drawing import KINDS, draw
from tests.crawled_sets import write_set

KEY = "candidates_st"
SHAPES = [(333, 500), (420, 400), (700, 280), (256, 512), (512, 300), (500, 500)]
"""(width, height); slim ones get three or four views by the model's own choice of grids."""
NEW_TOKENS = 12
REQUEST = "I want a red shirt, striped, not too long; naïve question?"
Lavic = Callable[..., str]
"""Runs a command in so many ranks; returns what it said."""


@dataclass(frozen=True, kw_only=True)
class Photos:
    """The sets and conversations that the stages read."""

    train: Path
    valid: Path
    rows: Path
    images: dict[str, Image.Image]
    """As decoded from the stored JPEG."""
    titles: dict[str, str]
    held_out: tuple[str, ...]
    """Items of `valid`."""
    listed: tuple[str, ...]
    targets: tuple[str, ...]
    """Of each row."""


def make_photos(folder: Path, *, train: int, valid: int) -> Photos:
    samples, images = [], {}
    for number, (width, height) in enumerate(SHAPES[: train + valid]):
        photo = draw(KINDS[number % len(KINDS)], "red", "striped", number).resize((width, height))
        data = io.BytesIO()
        photo.save(data, "JPEG", quality=92)
        item = f"B0R5{number:06d}"
        title = f"Acme № {number} “shirt”"
        images[item] = Image.open(io.BytesIO(data.getvalue())).convert("RGB")
        samples.append(
            Sample.of(item_id=item, n=0, jpg=data.getvalue(), title=title, width=width, height=height, text="")
        )
    write_set(folder / "train", samples[:train])
    write_set(folder / "valid", samples[train:], split="valid")
    ids = tuple(images)
    targets = tuple(ids[n % len(ids)] for n in range(4))
    rows = [
        {"context": f"<submission>{REQUEST}</submission>", "gt_items": [target], KEY: list(ids)} for target in targets
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Photos(
        train=folder / "train",
        valid=folder / "valid",
        rows=folder / "rows.jsonl",
        images=images,
        titles={sample.item_id: sample.title for sample in samples},
        held_out=ids[train:],
        listed=ids,
        targets=targets,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What all stages have left."""

    base: Path
    released: bool
    dtype: str
    folder: Path
    photos: Photos
    descriptions: dict[str, str]
    """By item."""
    flags: dict[str, str]
    """By item: what is wrong with its description, or empty."""
    recommended: list[dict[str, Any]]

    @property
    def captions(self) -> dict[str, dict[str, float]]:
        return dict(json.loads((self.folder / "distill" / "captions.json").read_text()))

    def valid_losses(self) -> list[float]:
        """Of stage 2: before the first step and after the last."""
        rows = map(json.loads, (self.folder / "tune" / "metrics.jsonl").read_text().splitlines())
        return [row["valid_loss"] for row in rows if "valid_loss" in row]

    def predictions(self, arm: str) -> list[dict[str, Any]]:
        rows = map(json.loads, (self.folder / "evaluation" / "predictions.jsonl").read_text().splitlines())
        return [row for row in rows if row["arm"] == arm]


def run_stages(
    folder: Path, base: Path, photos: Photos, lavic: Lavic, *, released: bool, dtype: str, ranks: int
) -> Run:
    """Runs describe, distill, embed, tune, evaluate and recommend."""
    sized = "7b-released" if released else "7b-24gb"
    suffix = "7b-released" if released else "7b"
    model = ["--model.name", base, "--model.dtype", dtype]
    # a rate at which two steps change what the model says
    loop = ["--loop.steps", 2, "--loop.global-batch-size", 2, "--loop.lr", 0.01, "--loop.num-workers", 0]
    descriptions: dict[str, str] = {}
    flags: dict[str, str] = {}
    for place in (photos.train, photos.valid):
        how = ["--batch-size", 1, "--max-new-tokens", NEW_TOKENS, "--flagged", "keep"]
        lavic(["describe", "--config", f"describe-{suffix}", *model, "--shards", place, *how], ranks=ranks)
        for sidecar in sorted(place.glob("*.descriptions.jsonl")):
            for row in map(json.loads, sidecar.read_text("utf-8").splitlines()):
                item = row["key"].rpartition("_")[0]
                descriptions[item], flags[item] = row["text"], row["flag"]
    sets = ["--shards", photos.train, "--valid", photos.valid, "--out", folder / "distill"]
    lavic(["distill", "--config", f"distill-{sized}", *model, *sets, *loop], ranks=ranks)
    sets = ["--shards", photos.train, photos.valid, "--adapter", folder / "distill", "--out", folder / "store"]
    how = ["--precision", "float32", "--batch-size", 2, "--num-workers", 0]
    lavic(["embed", "--config", f"embed-{suffix}", *model, *sets, *how], ranks=ranks)
    store = ["--store", folder / "store"]
    files = ["--train", photos.rows, "--valid", photos.rows, "--out", folder / "tune"]
    lavic(["tune", "--config", f"tune-{sized}", *model, *store, *files, *loop], ranks=ranks)
    bundle = ["--bundle", folder / "tune" / "bundle", *store, "--dtype", dtype]
    files = ["--test", photos.rows, "--out", folder / "evaluation", "--arms", "lavic", "before_tuning", "--gallery", 0]
    lavic(["evaluate", "--config", f"evaluate-{suffix}", *bundle, *files], ranks=ranks)
    output = lavic(["recommend", "--config", "recommend-7b", *bundle, "--conversation", photos.rows, "--json"], ranks=1)
    return Run(
        base=base,
        released=released,
        dtype=dtype,
        folder=folder,
        photos=photos,
        descriptions=descriptions,
        flags=flags,
        recommended=[json.loads(line) for line in output.splitlines() if line.startswith("{")],
    )


def as_words(argv: Sequence[object]) -> list[str]:
    return [str(word) for word in argv]
