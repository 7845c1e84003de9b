"""Catalogue, conversations and item store for the tests of `lavic retrieve`, and what it wrote."""

from __future__ import annotations

import json
import random
from pathlib import Path

KINDS = ["lamp", "shirt", "mug", "chair", "bag", "shoe", "clock", "hat"]
LOOKS = ["red", "green", "black", "striped", "dotted", "wooden", "glass", "woollen"]


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def title(number: int) -> str:
    return f"{LOOKS[number % 8]} {KINDS[number // 8 % 8]} of maker {number // 64}"


def write_catalogue(folder: Path, count: int = 128) -> Path:
    rows = [{"parent_asin": f"B{number:04d}", "title": title(number)} for number in range(count)]
    return write_rows(folder / "meta.jsonl", rows)


def write_conversations(path: Path, count: int = 40, seed: int = 0) -> Path:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        number = rng.randrange(128)
        mentioned = (number + 1) % 128
        context = f"<submission>I want a {title(number)}</submission><comment>Like the {title(mentioned)}?</comment>"
        row = {"context": context, "context_items": [f"B{mentioned:04d}"], "gt_items": [f"B{number:04d}"]}
        rows.append({**row, "gt": "kept as it is", "candidates_st": ["B0001", "B0002"]})
    return write_rows(path, rows)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text("utf-8"))


def write_item_store(folder: Path, numbers: range) -> Path:
    """Writes the files of an item store that list its items."""
    folder.mkdir(exist_ok=True)
    write_rows(folder / "items-00.jsonl", [{"id": f"B{n:04d}", "key": f"{n}", "title": title(n)} for n in numbers])
    (folder / "manifest.json").write_text(json.dumps({"parts": [{"name": "00", "items": len(numbers)}]}))
    return folder
