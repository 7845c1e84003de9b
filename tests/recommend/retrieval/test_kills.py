"""A build or extension that is killed gives the same index when it runs again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lavic.errors import DataError
from lavic.recommend.retrieval import RetrievalIndex

BUILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
from lavic.recommend.retrieval.bm25.build import Bm25Builder, Bm25Settings
from lavic.recommend.retrieval.build import VectorBuilder, add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row
from lavic.storage.output_folder import lock_output_folder

folder, count, kill_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
replaced, replace = 0, Path.replace

def counting(self, target):
    "Kills this process instead of the n-th rename."
    global replaced
    replaced += 1
    if replaced == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = counting
rows = [Row(f"B{n:04d}", f"lamp {n % 7} shirt {n % 11}") for n in range(count)]

def embed(texts):
    return np.array([[len(text), text.count("1"), text.count("2") + 0.5] for text in texts])

with lock_output_folder(folder):
    manifest, before = prepare_index(folder, lambda: rows, text={}, extend=True)
    builders = [Bm25Builder(Bm25Settings(part_rows=20)), VectorBuilder("meaning", {}, lambda: embed, chunk_rows=20)]
    add_methods(folder, manifest, builders, before)
print(replaced)
"""


def build(folder: Path, count: int, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BUILD, str(folder), str(count), str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.slow
def test_a_killed_build_resumes_with_the_same_files(tmp_path):
    uninterrupted = build(tmp_path / "uninterrupted", 50)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    files = int(uninterrupted.stdout)
    for kill_at in (1, files - 1):
        folder = tmp_path / f"killed-{kill_at}"
        assert build(folder, 50, kill_at).returncode == -signal.SIGKILL
        if kill_at <= 1:
            with pytest.raises(DataError, match="no retrieval index here"):
                RetrievalIndex.open(folder)
        resumed = build(folder, 50)
        assert resumed.returncode == 0, resumed.stderr
        assert content(folder) == content(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_a_killed_extension_leaves_the_old_index(tmp_path):
    assert build(tmp_path / "index", 50).returncode == 0
    before = RetrievalIndex.open(tmp_path / "index").search(["lamp 3"], 9, methods=["bm25"])
    assert build(tmp_path / "index", 70, kill_at=4).returncode == -signal.SIGKILL
    index = RetrievalIndex.open(tmp_path / "index")
    assert len(index) == 50
    assert index.search(["lamp 3"], 9, methods=["bm25"]) == before
    assert build(tmp_path / "index", 70).returncode == 0
    assert len(RetrievalIndex.open(tmp_path / "index")) == 70
