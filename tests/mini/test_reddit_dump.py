"""The synthetic Reddit dump: `lavic reddit` restores the synthetic conversations from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavic.cli import main
from lavic.data.conversations import read_conversations
from lavic.mini.reddit_dump import TEST_FROM, VALID_FROM

pytestmark = pytest.mark.slow


def test_lavic_reddit_restores_the_drawn_conversations(tmp_path: Path) -> None:
    data, dumps, out = tmp_path / "data", tmp_path / "dumps", tmp_path / "conversations"
    sizes = ["--train-items", "40", "--valid-items", "20", "--heldout-items", "20", "--combination-items", "10"]
    counts = {"train": 60, "valid": 20, "test": 20}
    conversation_counts = [arg for split, count in counts.items() for arg in (f"--{split}-conversations", str(count))]
    assert main(["mini", "catalog", "--out", str(data), *sizes, *conversation_counts]) == 0
    assert main(["mini", "dump", "--catalog", str(data), "--out", str(dumps), "--test", "15"]) == 0
    days = ["--split.valid-from", VALID_FROM, "--split.test-from", TEST_FROM]
    inputs = ["--dumps", str(dumps / "*.zst"), "--items", str(data / "meta_Mini.jsonl"), "--out", str(out)]
    assert main(["reddit", *inputs, *days, "--executor", "local"]) == 0
    for split, count in {**counts, "test": 15}.items():
        drawn = read_conversations(data / f"{split}.jsonl")[:count]
        built = read_conversations(out / f"{split}.jsonl")
        # The request is followed by the text about the asker's other products.
        shortened = [(row.targets, row.turns[0].text.partition(" I have the ")[0], row.turns[1:]) for row in built]
        assert sorted(shortened, key=str) == sorted(
            ((row.targets, row.turns[0].text, row.turns[1:]) for row in drawn), key=str
        )
    funnel = json.loads((out / "funnel.json").read_text())
    assert sum(split["rows"] for split in funnel["splits"].values()) == 95


def test_the_dump_is_deterministic(tmp_path: Path) -> None:
    data = tmp_path / "data"
    sizes = [f"--{name}-items" for name in ("train", "valid", "heldout", "combination")]
    rows = [f"--{name}-conversations" for name in ("train", "valid", "test")]
    argv = [word for flag in (*sizes, *rows) for word in (flag, "10")]
    assert main(["mini", "catalog", "--out", str(data), *argv]) == 0
    for name in ("a", "b"):
        assert main(["mini", "dump", "--catalog", str(data), "--out", str(tmp_path / name)]) == 0
    files = sorted(path.name for path in (tmp_path / "a").glob("*.zst"))
    assert len(files) == 6
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
