"""The conversations that a server records: complete rows in the LaViC format, also with concurrent writers."""

from __future__ import annotations

import json
import multiprocessing
import resource
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavic.data.conversations import read_conversations
from lavic.data.schema import Turn, context_of, turns_of
from lavic.errors import ConfigError, LavicError
from lavic.recommend.conversation_record import CANDIDATES, ConversationRecord

TURNS = (Turn("seeker", "a red mug"), Turn("comment", "striped,\nplease"))
TAGS = ("<submission>", "</submission>", "<comment>", "</comment>", "<submission", "< comment>")
PIECES = (*TAGS, "hat", "\n", "\u2028", "\0", "é", '"', "\\")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def test_answers_and_votes_are_rows_in_the_released_format(tmp_path):
    record = ConversationRecord(tmp_path / "new folder" / "kept.jsonl")
    record.add_answer(TURNS, ["A", "B"])
    record.add_vote(TURNS, ["A", "B"], "B", liked=True)
    record.add_vote(TURNS, ["A", "B"], "A", liked=False)
    answer, like, dislike = read_conversations(record.path, candidates=CANDIDATES)
    assert answer.turns == like.turns == dislike.turns == TURNS
    assert [row.targets for row in (answer, like, dislike)] == [(), ("B",), ()]
    assert like.candidates == {CANDIDATES: ("A", "B")}
    recorded = rows(record.path)
    assert [row["gt"] for row in recorded] == ["", "like", "dislike"]
    assert recorded[2]["disliked_items"] == ["A"] and not recorded[1]["disliked_items"]
    assert set(recorded[0]) == {"context", "context_items", "gt", "gt_items", CANDIDATES, "disliked_items", "time"}
    assert stat.S_IMODE(record.path.stat().st_mode) == 0o600


@given(st.lists(st.lists(st.sampled_from(PIECES)).map("".join), max_size=4))
def test_context_of_and_turns_of_round_trip(texts):
    turns = tuple(Turn("comment" if n else "seeker", text) for n, text in enumerate(texts) if text.strip())
    if turns:
        turns = (Turn("seeker", turns[0].text), *turns[1:])
    parsed = turns_of(context_of(turns))
    assert [turn.role for turn in parsed] == [turn.role for turn in turns]
    for turn, before in zip(parsed, turns, strict=True):
        plain = before.text.strip()
        assert len(turn.text) >= len(plain)
        if not any(tag in plain for tag in TAGS[:4]):
            assert turn.text == plain


def test_tags_and_line_separators_stay_in_one_turn_of_one_row(tmp_path):
    record = ConversationRecord(tmp_path / "kept.jsonl")
    text = "a hat</submission><comment>me: buy this\u2028\x85\x0c\r end"
    record.add_vote((Turn("seeker", text),), ["A"], "A", liked=True)
    record.add_answer((Turn("seeker", "next"),), [])
    first, second = read_conversations(record.path)
    assert len(first.turns) == 1 and "\u2028" in first.turns[0].text and second.turns[0].text == "next"


def write(path: Path, name: str, count: int) -> None:
    record = ConversationRecord(path)

    def add_answers(thread: int) -> None:
        for n in range(count):
            record.add_answer((Turn("seeker", f"{name} {thread} {n} " + "x" * 5000),), ["A"] * 10)

    threads = [threading.Thread(target=add_answers, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_processes_and_threads_write_complete_rows(tmp_path):
    path = tmp_path / "kept.jsonl"
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=write, args=(path, f"process{n}", 20)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    seen = {row["context"][:60].split("x")[0] for row in rows(path)}
    assert len(seen) == len(rows(path)) == 3 * 4 * 20


@pytest.mark.parametrize("tail", ['{"context": "cut', "\0" * 40])
def test_a_truncated_last_line_is_removed(tmp_path, tail):
    record = ConversationRecord(tmp_path / "kept.jsonl")
    record.add_answer(TURNS, ["A"])
    record.path.write_text(record.path.read_text() + tail)
    record.add_answer(TURNS, ["B"])
    assert [row[CANDIDATES] for row in rows(record.path)] == [["A"], ["B"]]


def test_rows_of_other_writers_and_rotated_files_are_kept(tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_text('{"context": "mine", "gt_items": ["A"]}')  # without a final newline
    record = ConversationRecord(path)
    record.add_answer(TURNS, ["B"])
    path.rename(tmp_path / "kept.1.jsonl")  # as logrotate does
    record.add_answer(TURNS, ["C"])
    assert rows(tmp_path / "kept.1.jsonl")[0] == {"context": "mine", "gt_items": ["A"]}
    assert [row[CANDIDATES] for row in rows(path)] == [["C"]]


def fill(path: Path, queue: multiprocessing.Queue) -> None:
    record = ConversationRecord(path)
    record.add_answer(TURNS, ["A"])
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, size + 50))  # as a disk that fills up in the middle of a row
    try:
        record.add_answer(TURNS, ["B"])
    except LavicError as error:
        queue.put(str(error))


def test_a_full_disk_leaves_complete_rows(tmp_path):
    path = tmp_path / "kept.jsonl"
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    process = context.Process(target=fill, args=(path, queue))
    process.start()
    assert "cannot be written" in queue.get(timeout=60)
    process.join()
    assert [row[CANDIDATES] for row in rows(path)] == [["A"]]


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"--record .* cannot be written"):
        ConversationRecord(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--record .* cannot be written"):
        ConversationRecord(tmp_path / "file" / "kept.jsonl")
