"""The tables of `benchmarks/fashion_summary.py` say what the files of a run say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COLOURS = {"A": "red", "B": "blue", "C": "red"}
"""Three shirts: A and C look alike."""


@pytest.fixture
def fashion_summary(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("fashion_summary")


def value(number: float) -> dict[str, float]:
    return {"value": number, "low": number - 0.1, "high": number + 0.1, "n": 2}


def write_run(out: Path, seed: int, hit_rate: float) -> Path:
    """A finished run of two conversations, which ask for A and for B."""

    def write(name: str, content: Any) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (out / name).write_text(text)

    item = {"categories": ["Apparel", "Topwear", "Shirts"], "details": json.dumps({"Department": "Men"})}
    rows = [{"context": "<submission>A shirt?</submission>", "context_items": [], "gt_items": [id]} for id in "AB"]
    test_set = {"conversations": 2, "clusters": 2, "arms": {"lavic": {"hit_rate": value(hit_rate)}}}
    write("seed", f"{seed}\n")
    write("seconds.tsv", "crawl\t3\ncrawl\t4\ntune\t10\n")
    write("catalog/looks_all.jsonl", "".join(json.dumps({"id": id, "look": c}) + "\n" for id, c in COLOURS.items()))
    write("catalog/meta_Fashion.jsonl", "".join(json.dumps({"parent_asin": id, **item}) + "\n" for id in COLOURS))
    write("test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write("runs/distill/captions.json", {k: {"perplexity": 1.5} for k in ("full", "cls_before", "cls_after")})
    write("evaluation/results.json", {"sets": {"test": test_set}})
    write("evaluation_retrieved/results.json", {"sets": {"test": {**test_set, "ceiling": {"row": 1.0}}}})
    # C has A's look, so A's list is right about the look; A is no shirt that looks like B
    write("evaluation_retrieved/trec/test/lavic.run", "test-0 Q0 C 1 2.0 x\ntest-0 Q0 A 2 1.0 x\ntest-1 Q0 A 1 1.0 x\n")
    write("retrieval/results.json", {"sets": {"test": {"methods": {"bm25": {"recall_at_10": value(0.25)}}}}})
    write("retrieval/test.bm25.run", "test-0 Q0 B 1 2.0 x\ntest-0 Q0 A 2 1.0 x\ntest-1 Q0 B 1 1.0 x\n")
    return out


def test_summary_has_the_numbers_of_the_files(fashion_summary: ModuleType, tmp_path: Path) -> None:
    summary = fashion_summary.summarise(write_run(tmp_path, 0, 0.625))
    assert summary["sets"]["test"]["arms"]["lavic"]["hit_rate"] == value(0.625)
    bm25 = summary["full_catalogue"]["bm25"]
    assert bm25 == {"recall_at_10": 0.25, "look_at_1": 0.5, "look_at_10": 1.0}
    # a random shirt is red for A with 2/3, blue for B with 1/3
    assert summary["full_catalogue"]["random item of the kind"]["look_at_1"] == pytest.approx(0.5)
    assert summary["end_to_end"]["arms"]["lavic"]["look_at_1"] == 0.5
    assert summary["seconds"] == {"crawl": 7, "tune": 10, "total": 17}


def test_tables_have_a_column_or_a_row_for_each_seed(fashion_summary: ModuleType, tmp_path: Path) -> None:
    seeds = {seed: fashion_summary.summarise(write_run(tmp_path / str(seed), seed, 0.5 + seed / 8)) for seed in (0, 1)}
    tables = fashion_summary.tables(seeds)
    assert "| `lavic` | .500 [.400, .600] | .625 [.525, .725] | .562 ± .088 |" in tables
    assert "| `bm25` | 0 |  | .250 |  | .500 | 1.000 |" in tables
    assert "| `lavic` | 0 | .500 [.400, .600] | .500 |" in tables and "|  | 1 | .625 [.525, .725] | .500 |" in tables
    assert "| all tokens | 1.500 | 1.500 |" in tables and "| seed 1 | 7 | 10 | 17 |" in tables
