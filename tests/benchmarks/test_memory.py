"""What indexes take in memory does not grow with the processes, nor open files with the shards."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"
pytestmark = pytest.mark.slow
pytest.importorskip("psutil", reason="psutil is not installed: pip install '.[train]'")


def test_an_item_takes_few_bytes_of_a_node_and_shards_no_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    memory = importlib.import_module("memory")
    few = ("--items", 60_000, 180_000, "--shard", 500, "--processes", 3, "--shards", 400)
    command = [sys.executable, SCRIPT, *few, "--work", tmp_path, "--json", tmp_path / "result.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    # growth between the sizes: what does not depend on the items drops out
    for part in memory.PARTS:
        assert memory.per_item(result, part)[3] < memory.GOAL, done.stdout
    for row in (result["shards"], *(row for size in result["sizes"].values() for row in size["measured"])):
        assert row["files"] < 200
        assert all(row[part]["sent"] < 1500 and row[part]["shm"] == 0 for part in memory.PARTS)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_the_document_says_what_was_measured() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
