"""`lavic recommend` from a file, a pipe and a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lavic.errors import ConfigError, DataError
from lavic.launch import recommend
from lavic.model.bundle import Bundle
from lavic.model.itemstore import ItemStore
from lavic.recommend.rank import Ranker, Request

from .conftest import KEY, Ground

TALK = "<submission>I want a red striped mug</submission>\n<comment>Any ideas?</comment>"


def words(ground: Ground, *more: str | Path) -> list[str]:
    return [str(word) for word in ("--bundle", ground.bundle, "--store", ground.store, *more)]


def test_every_row_of_a_file_as_json(ground: Ground, capsys: pytest.CaptureFixture[str]):
    assert recommend.main(words(ground, "--conversation", ground.test, "--json", "--top", "3")) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ranker = Ranker(Bundle.load(ground.bundle), ItemStore.open(ground.store))
    asked = [Request(conversation=c, candidates=c.candidates[KEY]) for c in ground.conversations]
    for row, ranking in zip(rows, ranker.rank(asked), strict=True):
        assert [item["id"] for item in row["ranking"]] == list(ranking.ids[:3])
        assert row["ranking"][0]["probability"] == pytest.approx(ranking.probabilities[0], abs=1e-6)
        assert row["ranking"][0]["title"] == ranker.store.title(ranking.ids[0])


def test_a_text_and_named_candidates(ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ids = ItemStore.open(ground.store).ids[:4]
    (tmp_path / "talk.txt").write_text(TALK)
    assert recommend.main(words(ground, "--conversation", tmp_path / "talk.txt", "--candidates", *ids)) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4
    shown = [re.match(r"\s*\d+\s+([\d.]+)%\s+(\w+)  Acme mug \d\d$", line) for line in lines]
    assert all(shown)
    assert sorted(match[2] for match in shown) == sorted(ids)
    assert sum(float(match[1]) for match in shown) == pytest.approx(100, abs=0.3)


def test_a_pipe_and_a_file_of_candidates(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    ids = ItemStore.open(ground.store).ids[:4]
    (tmp_path / "ids.txt").write_bytes("\r\n".join([*ids, "", ""]).encode("utf-16"))
    found = []
    for text in (TALK, json.dumps({"context": TALK, "gt_items": []})):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8-sig"))))
        assert recommend.main(words(ground, "--candidates-file", tmp_path / "ids.txt", "--json")) == 0
        found.append(json.loads(capsys.readouterr().out)["ranking"])
    assert found[0] == found[1]


def test_typed_in_a_terminal(ground: Ground):
    """In a real pseudo-terminal: a request, a further line, the end."""
    ids = ItemStore.open(ground.store).ids[:3]
    outer, inner = pty.openpty()
    plain = {**os.environ, "TERM": "dumb"}  # no escape sequences around the prompt
    command = [sys.executable, "-m", "lavic", "recommend", *words(ground, "--candidates", *ids)]
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=subprocess.DEVNULL, env=plain)
    os.close(inner)

    def read_until(mark: bytes) -> bytes:
        seen, until = b"", time.monotonic() + 60
        while mark not in seen and time.monotonic() < until:
            if select.select([outer], [], [], 1.0)[0]:
                seen += os.read(outer, 4096)
        assert mark in seen, seen
        return seen

    try:
        read_until(b"\n> ")
        os.write(outer, b"I want a red mug\n")
        first = read_until(b"\n> ").decode()
        assert all(item in first for item in ids)
        assert "█" in first
        os.write(outer, b"striped please\n")
        assert read_until(b"\n> ").decode() != first
        os.write(outer, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(outer)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--conversation", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--conversation", "{talk}"], "name the items to choose from"),
        (["--conversation", "{talk}", "--candidates", "B0NOWHERE0"], "B0NOWHERE0 is not in the item store"),
        (["--conversation", "{talk}", "--candidates", "a", "--candidates-file", "b"], "give one of them"),
        (["--conversation", "{talk}", "--candidates-file", "nowhere"], "--candidates-file nowhere: no such file"),
        (["--conversation", "{test}", "--key", "candidates_xx"], "has no candidate list `candidates_xx`"),
        (["--conversation", "{empty}", "--candidates", "a"], "empty; say what is looked for"),
    ],
)
def test_refusals(ground: Ground, tmp_path: Path, given: list[str], message: str):
    (tmp_path / "talk.txt").write_text(TALK)
    (tmp_path / "empty.txt").write_text("\n")
    places = {"talk": tmp_path / "talk.txt", "test": ground.test, "empty": tmp_path / "empty.txt"}
    with pytest.raises((ConfigError, DataError), match=re.escape(message)):
        recommend.main(words(ground, *(word.format(**places) for word in given)))
