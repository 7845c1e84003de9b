"""Conversation files: the LaViC format, and what is said about others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lavic.data.conversations import read_conversations
from lavic.errors import DataError

ROW = {
    "context": "<submission>A mug?</submission>\n",
    "context_items": [],
    "gt": "...",
    "gt_items": ["B1"],
    "candidates_st": ["B1", "B2"],
    "candidates_gpt_large": ["B3"],
}


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_reads_in_order_with_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", json.dumps(ROW), "", json.dumps(ROW))
    first, second = read_conversations(path, candidates="candidates_st")
    assert (first.id, second.id, second.row, second.file) == ("test-0", "test-1", 1, str(path))
    assert second.place == f"{path}:3"  # a blank line counts for the place alone
    assert set(first.candidates) == {"candidates_st", "candidates_gpt_large"}


def test_a_missing_list_names_those_there(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", json.dumps(ROW))
    with pytest.raises(DataError, match="no candidate list `candidates_x`; it has: candidates_st, candidates_gpt"):
        read_conversations(path, candidates="candidates_x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not JSON"),
        ("[]", ":2: a list where an object"),
        ("[" * 100_000, ":2: not JSON .nested more than 200 levels deep"),
        ('{"context": ' + "1" * 5000 + "}", ":2: not JSON .a number has too many digits"),
        ('{"title": 1}', ":2: not a conversation.*title"),
        ('{"context": "x", "gt_items": 5}', ":2: `gt_items` is the number 5, not a list of item ids"),
        ('{"context": "x", "gt_items": "B1"}', ":2: `gt_items` is a text, not a list of item ids"),
        ('{"context": "x", "gt_items": null}', ":2: `gt_items` is null, not a list"),
        ('{"context": "x", "gt_items": ["B1", 7]}', r":2: `gt_items\[1\]` is the number 7, not an item id as text"),
        ('{"context": "x", "gt_items": [null]}', r":2: `gt_items\[0\]` is null"),
        ('{"context": "x", "gt_items": [""]}', r":2: `gt_items\[0\]` is empty"),
        ('{"context": ["a", "b"], "gt_items": []}', ":2: `context` is a list, not text"),
        ('{"context": null, "gt_items": []}', ":2: `context` is null, not text"),
        ('{"context": {"a": 1}, "gt_items": []}', ":2: `context` is an object, not text"),
        ('{"context": true, "gt_items": []}', ":2: `context` is a boolean, not text"),
        ('{"context": "x", "gt_items": [], "candidates_st": {"a": 1}}', ":2: `candidates_st` is an object, not a list"),
        ('{"context": "x", "gt_items": [], "candidates_st": [["B1"]]}', r":2: `candidates_st\[0\]` is a list"),
        ('{"context": "x", "gt_items": [], "context_items": 1.5}', ":2: `context_items` is the number 1.5"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_conversations(write(tmp_path / "test.jsonl", json.dumps(ROW), line))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_exported_and_packed_files_are_read(tmp_path: Path, encoding: str) -> None:
    for name in ("test.jsonl", "test.jsonl.gz", "test.JSONL.GZ"):
        path = tmp_path / name
        path.write_bytes(gzip.compress((json.dumps(ROW) + "\r\n").encode(encoding)))
        assert [(row.id, row.targets) for row in read_conversations(path)] == [("test-0", ("B1",))]


@pytest.mark.parametrize("name", ["test.json", "test.jsonl", "test"])
def test_a_list_and_rows_over_several_lines_are_read(tmp_path: Path, name: str) -> None:
    rows = [ROW, ROW | {"gt_items": ["B2"]}]
    for text in (json.dumps(rows), json.dumps(rows, indent=2), "\n".join(json.dumps(row, indent=1) for row in rows)):
        conversations = read_conversations(write(tmp_path / name, text))
        assert [(row.id, row.targets) for row in conversations] == [("test-0", ("B1",)), ("test-1", ("B2",))]
    broken = json.dumps([ROW, ROW | {"context": None}], indent=1)
    with pytest.raises(DataError, match=rf"{name}:17: `context` is null"):
        read_conversations(write(tmp_path / name, broken))


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such conversation file"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="contains no conversations"):
        read_conversations(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_conversations(tmp_path / "latin.jsonl")


def test_the_first_of_a_longer_list(tmp_path: Path) -> None:
    row = ROW | {"candidates_long": ["B5", "B5", "B3", "B9", "B1"], "candidates_other": ["B7", "B8", "B9"]}
    path = write(tmp_path / "test.jsonl", json.dumps(row))
    (first,) = read_conversations(path, candidates="candidates_long", top=3)
    assert first.candidates["candidates_long"] == ("B5", "B3", "B9"), "different items; no target is put in"
    assert first.candidates["candidates_other"] == ("B7", "B8", "B9")
    (every,) = read_conversations(path, candidates="candidates_long", top=99)
    assert every.candidates["candidates_long"] == ("B5", "B3", "B9", "B1")
