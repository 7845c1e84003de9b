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

from lavic.data.schema import Conversation
from lavic.errors import ConfigError, DataError
from lavic.launch import recommend
from lavic.model.bundle import Bundle
from lavic.model.item_store import ItemStore
from lavic.recommend.ranking.ranker import Ranker
from lavic.recommend.ranking.request import Request
from lavic.recommend.recommendation import Recommendation, RecommendedItem

from .conftest import KEY, Assets

TAGGED_TEXT = "<submission>I want a red striped mug</submission>\n<comment>Any ideas?</comment>"


def argv_for(assets: Assets, *options: str | Path) -> list[str]:
    return [str(arg) for arg in ("--bundle", assets.bundle, "--store", assets.store, *options)]


def test_rows_of_a_file_are_ranked_as_json(assets: Assets, capsys: pytest.CaptureFixture[str]):
    assert recommend.main(argv_for(assets, "--conversation", assets.test, "--json", "--top", "3")) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ranker = Ranker(Bundle.load(assets.bundle), ItemStore.open(assets.store))
    requests = [Request(conversation=c, candidates=c.candidates[KEY]) for c in assets.conversations]
    for row, ranking in zip(rows, ranker.rank(requests), strict=True):
        assert [item["id"] for item in row["ranking"]] == list(ranking.ids[:3])
        assert row["ranking"][0]["probability"] == pytest.approx(ranking.probabilities[0], abs=1e-6)
        assert row["ranking"][0]["title"] == ranker.store.title(ranking.ids[0])


def test_a_terminal_does_not_obey_a_title():
    item = RecommendedItem(
        id="B0\x1b]0;x\x07", title="a\x1b[2J mug \u202egum\x9b1m ☕\u200d", probability=1.0, logprob=0.0
    )
    table = recommend._table(Conversation(id="t", turns=()), Recommendation(items=(item,), candidates=1))
    assert table == "  1  100.0%  B0\ufffd]0;x\ufffd  a\ufffd[2J mug \ufffdgum\ufffd1m ☕\u200d\n"


def test_a_text_file_and_candidates_give_a_table(assets: Assets, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ids = ItemStore.open(assets.store).ids[:4]
    (tmp_path / "talk.txt").write_text(TAGGED_TEXT)
    assert recommend.main(argv_for(assets, "--conversation", tmp_path / "talk.txt", "--candidates", *ids)) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4
    shown = [re.match(r"\s*\d+\s+([\d.]+)%\s+(\w+)  Acme mug \d\d$", line) for line in lines]
    assert all(shown)
    assert sorted(match[2] for match in shown) == sorted(ids)
    assert sum(float(match[1]) for match in shown) == pytest.approx(100, abs=0.3)


def test_standard_input_and_a_candidates_file(
    assets: Assets, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    ids = ItemStore.open(assets.store).ids[:4]
    (tmp_path / "ids.txt").write_bytes(("\r\n".join(ids[:2]) + f"\r\n{ids[2]}, {ids[3]}\r\n\r\n").encode("utf-16"))
    rankings = []
    for text in (TAGGED_TEXT, json.dumps({"context": TAGGED_TEXT, "gt_items": []})):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8-sig"))))
        assert recommend.main(argv_for(assets, "--candidates-file", tmp_path / "ids.txt", "--json")) == 0
        rankings.append(json.loads(capsys.readouterr().out)["ranking"])
    assert rankings[0] == rankings[1]


@pytest.mark.slow
def test_a_session_in_a_terminal(assets: Assets):
    """In a pseudo-terminal: a request, a second line, end of input."""
    ids = ItemStore.open(assets.store).ids[:3]
    outer, inner = pty.openpty()
    env = {**os.environ, "TERM": "dumb"}  # no escape sequences around the prompt
    command = [sys.executable, "-m", "lavic", "recommend", *argv_for(assets, "--candidates", *ids)]
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=subprocess.DEVNULL, env=env)
    os.close(inner)

    def read_until(marker: bytes) -> bytes:
        received, deadline = b"", time.monotonic() + 60
        while marker not in received and time.monotonic() < deadline:
            if select.select([outer], [], [], 1.0)[0]:
                received += os.read(outer, 4096)
        assert marker in received, received
        return received

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


def test_text_on_the_command_line_and_ids_with_commas(assets: Assets, tmp_path: Path, capsys):
    ids = ItemStore.open(assets.store).ids[:3]
    (tmp_path / "talk.txt").write_text("I want a red mug")
    outputs = []
    for conversation, candidates in (
        (tmp_path / "talk.txt", ids),
        ("I want a red mug", [",".join(ids)]),
        ("I want a red mug", [f"{ids[0]},", f" {ids[1]} , {ids[2]}"]),
    ):
        assert (
            recommend.main(argv_for(assets, "--conversation", conversation, "--candidates", *candidates, "--json")) == 0
        )
        outputs.append(json.loads(capsys.readouterr().out)["ranking"])
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("text", [TAGGED_TEXT, "<submission>mug</submission>", "<submission>and/or</submission>"])
def test_a_text_with_tags_is_not_taken_for_a_path(assets: Assets, tmp_path: Path, capsys, text: str):
    ids = ItemStore.open(assets.store).ids[:3]
    (tmp_path / "talk.txt").write_text(text)
    outputs = []
    for conversation in (text, tmp_path / "talk.txt"):
        assert recommend.main(argv_for(assets, "--conversation", conversation, "--candidates", *ids, "--json")) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0]["ranking"] == outputs[1]["ranking"]
    assert [output["id"] for output in outputs] == ["conversation", "talk"]


def test_without_candidates_the_index_is_searched(assets: Assets, index: Path, capsys):
    argv = argv_for(assets, "--index", index, "--json")
    assert recommend.main([*argv, "--conversation", "an acme mug"]) == 0
    ranking = json.loads(capsys.readouterr().out)["ranking"]
    assert len(ranking) == 10 and all(item["scores"]["bm25"] > 0 for item in ranking)
    assert recommend.main([*argv, "--conversation", str(assets.test), "--top", "4", "--retrieved", "12"]) == 0
    rows = [json.loads(line)["ranking"] for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(assets.conversations) and max(map(len, rows)) == 4
    with pytest.raises(DataError, match="nowhere"):
        recommend.main(argv_for(assets, "--index", "nowhere", "--conversation", "a mug"))


@pytest.mark.parametrize("text", ["{brand} mug, red please", "{", '{"a": 1} is not what I want', "[red] mug"])
def test_text_that_begins_like_json_is_text(assets: Assets, tmp_path: Path, capsys, text: str):
    ids = ItemStore.open(assets.store).ids[:3]
    (tmp_path / "talk.txt").write_text(text)
    assert recommend.main(argv_for(assets, "--conversation", tmp_path / "talk.txt", "--candidates", *ids)) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 3
    (tmp_path / "talk.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"talk\.jsonl:1: "):
        recommend.main(argv_for(assets, "--conversation", tmp_path / "talk.jsonl", "--candidates", *ids))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("listed", [False, True])
def test_json_is_not_taken_for_text(assets: Assets, monkeypatch, capsys, listed: bool, indent: int | None):
    ids = ItemStore.open(assets.store).ids[:3]
    row = {"context": TAGGED_TEXT, "gt_items": []}
    outputs = []
    for text in (TAGGED_TEXT, json.dumps([row] if listed else row, indent=indent)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert recommend.main(argv_for(assets, "--candidates", *ids, "--json")) == 0
        outputs.append(json.loads(capsys.readouterr().out)["ranking"])
    assert outputs[0] == outputs[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text[: len(text) // 2].encode())))
    with pytest.raises(DataError, match=r"standard input:\d+: not JSON"):
        recommend.main(argv_for(assets, "--candidates", *ids))


def test_an_empty_conversation_does_not_wait_for_standard_input(assets: Assets):
    with pytest.raises(DataError, match="--conversation: empty"):
        recommend.main(argv_for(assets, "--candidates", "A", "--conversation", ""))


def test_invalid_utf8_on_standard_input_is_replaced_and_reported(assets: Assets, monkeypatch, capsys):
    ids = ItemStore.open(assets.store).ids[:3]
    outputs = []
    for data in (b"a caf\xe9 mug", "a caf\ufffd mug".encode()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert recommend.main(argv_for(assets, "--candidates", *ids, "--json")) == 0
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out
    assert "not UTF-8" in outputs[0].err and not outputs[1].err


def test_missing_drop_removes_items_missing_from_the_store(assets: Assets, tmp_path: Path, capsys):
    ids = ItemStore.open(assets.store).ids[:3]
    rows = [
        {"context": TAGGED_TEXT, "gt_items": [], KEY: [*ids, "B0NOWHERE0"]},
        {"context": TAGGED_TEXT, "gt_items": [], KEY: []},
        {"context": TAGGED_TEXT, "gt_items": [], KEY: ids},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = argv_for(assets, "--conversation", tmp_path / "rows.jsonl", "--missing", "drop", "--json")
    assert recommend.main(argv) == 0
    output = capsys.readouterr()
    first, second, third = (json.loads(line)["ranking"] for line in output.out.splitlines())
    assert first == third and len(first) == 3 and second == []
    assert f"rows.jsonl:1: {KEY}: 1 of 4 items are not in the store" in output.err
    assert f"rows.jsonl:2: the list {KEY} is empty" in output.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--conversation", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--conversation", "{talk}"], "give the items to rank"),
        (
            ["--conversation", "{talk}", "--candidates", "B0NOWHERE0"],
            "--candidates: B0NOWHERE0 is not in the item store",
        ),
        (["--conversation", "{talk}", "--candidates", "{lower}"], "did you mean {upper}?"),
        (
            ["--conversation", "{talk}", "--candidates-file", "{ids}"],
            "--candidates-file: B0NOWHERE0 and 1 more are not in",
        ),
        (["--conversation", "{talk}", "--candidates", ","], "--candidates: no item id in it"),
        (
            ["--conversation", "{talk}", "--candidates", "B0NOWHERE0", "--missing", "drop"],
            "no candidate is left to rank",
        ),
        (["--conversation", "{rows}"], "rows.jsonl:2: `context` is a list, not text"),
        (["--conversation", "{unlisted}"], "unlisted.jsonl: no candidate is left to rank"),
        (["--conversation", "./a lamp", "--candidates", "a"], "./a lamp: no such file"),
        (["--conversation", "{talk}", "--candidates", "a", "--candidates-file", "b"], "give one of them"),
        (["--conversation", "{talk}", "--candidates-file", "nowhere"], "--candidates-file nowhere: no such file"),
        (["--conversation", "{test}", "--key", "candidates_xx"], ":1: no candidate list `candidates_xx`"),
        (["--conversation", "{empty}", "--candidates", "a"], "empty; write what you are looking for"),
        (["--conversation", "<submission></submission>", "--candidates", "a"], "--conversation: empty; write what"),
        (["--conversation", "<comment>a mug</comment>", "--candidates", "a"], "--conversation: no message of a user"),
        (["--conversation", "{talk}", "--candidates", "a", "--store", "{index}"], "not the manifest of an item store"),
    ],
)
def test_invalid_input_is_refused(assets: Assets, tmp_path: Path, options: list[str], message: str):
    (tmp_path / "talk.txt").write_text(TAGGED_TEXT)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "ids.txt").write_text("B0NOWHERE0\nB0NOWHERE1\n")
    row = {"context": TAGGED_TEXT, "gt_items": [], KEY: []}
    (tmp_path / "unlisted.jsonl").write_text(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'context': [TAGGED_TEXT]})}")
    values = {name: tmp_path / f"{name}.txt" for name in ("talk", "empty", "ids")}
    values |= {name: tmp_path / f"{name}.jsonl" for name in ("rows", "unlisted")} | {"test": assets.test}
    item = ItemStore.open(assets.store).ids[0]
    values |= {"lower": item.lower(), "upper": item, "index": tmp_path / "index"}
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "manifest.json").write_text('{"format": "lavic-retrieval/1"}')
    message = message.format(**values)
    with pytest.raises((ConfigError, DataError), match=re.escape(message)):
        recommend.main(argv_for(assets, *(option.format(**values) for option in options)))
