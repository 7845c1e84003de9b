"""The benchmark of `lavic reddit`: its dumps are as hard as real ones, and it runs whole on a few comments."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, median

import pytest

from lavic.data.links import asins
from lavic.data.reddit.dumps.post import post_from_row

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_comments_are_like_those_of_arctic_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    lines = list(importlib.import_module("reddit_dump").comment_lines(6000))
    rows = [json.loads(line) for line in lines]
    posts = [post_from_row(row) for row in rows]
    assert len({post.id for post in posts}) == 6000 and len({post.submission for post in posts}) == 750
    assert {len(row) for row in rows} == {54} and 1300 < mean(map(len, lines)) < 1600
    lengths = [len(post.text) for post in posts]
    assert 140 < mean(lengths) < 200 and median(lengths) < 120
    assert sum(bool(asins(post.text)) for post in posts) == 20
    assert sum("amazon" in post.text.lower() for post in posts) == 20 + 40
    whole = b"".join(lines)
    assert whole.count(rb"\u") > 2000 and len(re.findall(rb"(?i)[am]z|\.c", whole)) > 600


@pytest.mark.slow
def test_speed_memory_and_workers_are_measured(tmp_path: Path) -> None:
    words = ["--folder", tmp_path, "--comments", 3000, "--repeats", 1, "--sizes", 1500, 3000]
    done = subprocess.run(
        [sys.executable, FOLDER / "reddit.py", *map(str, words)], capture_output=True, text=True, check=True
    )
    assert "Speed, 3,000 comments, 10 with an item" in done.stdout
    assert len(re.findall(r"^.* [\d,]+ comments/s   scan is +\d+\.\d\d x$", done.stdout, re.MULTILINE)) == 4
    assert len(re.findall(r"1 worker +\S+ s   2 workers +\S+ s +\d+\.\d\d x", done.stdout)) == 2
    assert re.search(r"^ +3,000 comments +\d+ MiB +\d+ conversations", done.stdout, re.MULTILINE)
