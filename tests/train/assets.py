"""Files that both stages start from: a miniature with random weights, drawn photos, an item store, conversations."""

from __future__ import annotations

import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample
from lavic.mini import architecture
from lavic.mini.architecture import Architecture
from lavic.mini.drawing import COLOURS, KINDS, PATTERNS, draw
from lavic.mini.tokenizer import make_tokenizer
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.item_store import write_manifest, write_part
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter, save_adapter
from lavic.model.visual_tokens import cls_tokens
from tests.crawled_sets import write_set

KEY = "candidates_st"
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
"""(height, width) of LLaVA-v1.6's grids, for views of 24 pixels."""
PROMPT_WORDS = "Seeker: Comment: Candidates: Which one? Answer with its ID. Title: Describe how it looks. B0MN , word"


@dataclass(frozen=True)
class Assets:
    """Where everything is."""

    base: Path
    photos: Path
    """Of `ids`, with a description each but the last."""
    valid: Path
    vision: Path
    """Adapter that is not zero."""
    store: Path
    """float32 tokens of every photo, by `base` with `vision`."""
    rows: Path
    """24 conversations."""
    ids: tuple[str, ...]


def make_photos(count: int, seed: int) -> list[Sample]:
    """Photos of any shape; the last one has no description."""
    rng = random.Random(seed)
    photos = []
    for number in range(count):
        kind, colour, pattern = rng.choice(sorted(KINDS)), rng.choice(sorted(COLOURS)), rng.choice(sorted(PATTERNS))
        photo = draw(kind, colour, pattern, rng.randrange(2**31))
        photo = photo.resize((rng.randrange(30, 120), rng.randrange(30, 120)))
        data = io.BytesIO()
        photo.save(data, "JPEG", quality=90)
        words = " ".join(rng.choices(("very", "nice", "and", "new"), k=rng.randrange(5)))
        photos.append(
            Sample.of(
                item_id=f"B0MN{seed:02d}{number:04d}",
                n=0,
                jpg=data.getvalue(),
                title=f"Acme {kind}",
                width=photo.width,
                height=photo.height,
                text="" if number == count - 1 else f"A {colour} {pattern} {kind}. {words}",
            )
        )
    return photos


def make_assets(folder: Path) -> Assets:
    photos, valid = make_photos(24, 1), make_photos(6, 2)
    write_set(folder / "photos", photos, photos_per_shard=10)
    write_set(folder / "valid", valid)
    tokenizer = make_tokenizer([PROMPT_WORDS, *(f"{p.title} {p.text}" for p in (*photos, *valid))])
    torch.manual_seed(0)
    small = Architecture(view=24, patch=12, vision_width=16, vision_layers=2, width=32, layers=2, heads=2)
    architecture.save(architecture.build(small, tokenizer), tokenizer, folder / "base")
    processor = folder / "base" / "preprocessor_config.json"  # with the choice of grids that LLaVA-v1.6 has
    processor.write_text(json.dumps({**json.loads(processor.read_text()), "image_grid_pinpoints": PINPOINTS}))

    backbone = Backbone.load(ModelSettings(name=str(folder / "base")))
    vision = add_adapter(backbone, "vision", LoraSettings(r=2))
    for name, parameter in vision.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(vision, folder / "vision", backbone, "vision")
    data = ShardDataset(folder / "photos")
    vision.eval()
    views = torch.stack([torch.from_numpy(backbone.geometry.cut(data[i].image)) for i in range(len(data))])
    with torch.no_grad():
        tokens = cls_tokens(backbone.model, views)
    ids = tuple(data[i].item_id for i in range(len(data)))
    items = [{"id": id, "key": f"{id}_0", "title": data[i].title} for i, id in enumerate(ids)]
    (folder / "store").mkdir()
    part = write_part(folder / "store", "00000", items, tokens)
    write_manifest(folder / "store", backbone, folder / "vision", [part])

    rng = random.Random(4)
    rows = []
    for _ in range(24):
        listed = rng.sample(ids, 5)
        targets = rng.choice([[listed[2]], [listed[0], listed[4]], [rng.choice(ids)]])
        request = " ".join(rng.choices(PROMPT_WORDS.split(), k=rng.randrange(3, 20)))
        rows.append({"context": f"<submission>{request}</submission>", "gt_items": targets, KEY: listed})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Assets(
        folder / "base",
        folder / "photos",
        folder / "valid",
        folder / "vision",
        folder / "store",
        folder / "rows.jsonl",
        ids,
    )
