"""Catalogues for the tests of crawl plans, and what a plan holds."""

from __future__ import annotations

import json
from pathlib import Path

from lavic.shards.plan.crawl_plan import Plan, read_tasks
from lavic.shards.plan.photo_tasks import PlanSettings

SETTINGS = PlanSettings(
    set="cups",
    split="train",
    photos_per_shard=4,
    photos="first",
    image_size="hi_res",
    photo={"check": "decode"},
)


def write_items(path: Path, items: dict[str, int]) -> tuple[str, ...]:
    """Writes a LaViC catalogue; `items` maps ids to numbers of photos."""
    metas = {
        id: {
            "title": id,
            "categories": ["a", "b"],
            "images": [{"large": f"http://x/{id}/{n}.jpg"} for n in range(count)],
        }
        for id, count in items.items()
    }
    path.write_text(json.dumps(metas))
    return (str(path),)


def planned_keys(plan: Plan) -> list[str]:
    return [task.key for number in range(len(plan.digests)) for task in read_tasks(plan.shard(number))]


def write_described(path: Path, texts: dict[str, str]) -> tuple[str, ...]:
    """Writes a catalogue of items with one photo each; an empty text means no description."""
    metas = {
        id: {
            "title": f"Title {id}",
            "images": [{"large": f"http://x/{id}.jpg"}],
            "image_descriptions_llava_cleaned": {f"{id}_0.jpg": text} if text else {},
        }
        for id, text in texts.items()
    }
    path.write_text(json.dumps(metas))
    return (str(path),)


def planned_captions(plan: Plan) -> dict[str, str]:
    return {task.item_id: task.text for number in range(len(plan.digests)) for task in read_tasks(plan.shard(number))}


def write_links(path: Path, *items: tuple[str, list[str]]) -> tuple[str, ...]:
    """Writes a catalogue of (id, photo URLs)."""
    lines = [{"parent_asin": id, "title": id, "images": [{"large": url} for url in urls]} for id, urls in items]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (str(path),)
