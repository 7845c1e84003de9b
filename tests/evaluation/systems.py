"""Made-up systems: conversations with candidate lists, their scores as TREC runs, and `lavic evaluate` on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lavic.launch import evaluate

KEY = "candidates_st"


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations over lists of eight; every second thread has two of them, and every third target is not listed."""
    rng = random.Random(seed)
    conversations = []
    for number in range(count):
        listed = [f"B{item:09}" for item in rng.sample(range(500), 8)]
        target = listed[rng.randrange(8)] if number % 3 else "B999999999"
        context = f"<submission>thread {number // 2 if number % 4 < 2 else number}</submission>"
        context += f"<comment>row {number}</comment>"
        conversations.append({"context": context, "context_items": [], "gt_items": [target], KEY: listed})
    return conversations


def write(path: Path, conversations: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations), encoding="utf-8")
    return path


def run(out: Path, test: Path, *words: object) -> dict[str, Any]:
    args = ["--test", test, "--out", out, "--draws", "300", *words]
    assert evaluate.main([str(word) for word in args]) == 0
    return json.loads((out / "results.json").read_text())


def scorer(seed: int, skill: float) -> Any:
    """A made-up system: the score of an item for a row."""

    def score(row: dict[str, Any], item: str) -> float:
        return random.Random(f"{seed}{row['context']}{item}").random() + skill * (item in row["gt_items"])

    return score


def trec(path: Path, conversations: list[dict[str, Any]], score: Any, query: str = "t-{}") -> Path:
    lines = []
    for number, row in enumerate(conversations):
        lines += [f"{query.format(number)} Q0 {item} 0 {score(row, item)!r} x" for item in row[KEY]]
    random.Random(0).shuffle(lines)  # neither the order of lines nor the column of ranks says anything
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
