"""Splits by time, with what is the same kept together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lavic.data.reddit.near_duplicates import exact_hash, group_submissions, signature_of
from lavic.data.reddit.sentiment import sentiment
from lavic.data.reddit.settings import SplitSettings
from lavic.data.reddit.splits import SUBMISSION, split_submissions

LONG = "what is the best safety razor for a beginner with sensitive skin and a thick beard that needs a daily shave"


def table(path: Path, rows: list[tuple]) -> Path:
    """Writes submissions: (id, created, rows, crosspost, text)."""
    records = np.zeros(len(rows), SUBMISSION)
    for n, (id, created, count, crosspost, text) in enumerate(rows):
        records[n] = (id, created, count, crosspost, exact_hash(text, f"author{id}"), signature_of(text))
    records.tofile(path)
    return path


def text(n: int) -> str:
    return " ".join(f"word{n}x{k}" for k in range(20))


def test_shares_are_of_rows_and_by_time(tmp_path: Path) -> None:
    rows = [(n, 1000 + n, 1, 0, text(n)) for n in range(1, 101)]
    parts = split_submissions(
        [table(tmp_path / "a", rows[::2]), table(tmp_path / "b", rows[1::2])], SplitSettings()
    ).parts
    placed = {
        id: int(split)
        for part, ids in zip(parts, (range(1, 101, 2), range(2, 101, 2)), strict=True)
        for id, split in zip(ids, part, strict=True)
    }
    assert [placed[id] for id in range(1, 101)] == [0] * 80 + [1] * 10 + [2] * 10


def test_days_can_be_given(tmp_path: Path) -> None:
    day = 86_400
    file = table(tmp_path / "a", [(n, n * day, 1, 0, text(n)) for n in range(1, 7)])
    [part] = split_submissions([file], SplitSettings(valid_from="1970-01-03", test_from="1970-01-05")).parts
    assert part.tolist() == [0, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="the earlier day first"):
        SplitSettings(valid_from="1970-01-05", test_from="1970-01-03")


def test_near_duplicates_and_crossposts_are_in_the_split_of_their_first(tmp_path: Path) -> None:
    rows = [(n, 1000 + n, 1, 0, text(n)) for n in range(1, 21)]
    rows[0] = (1, 1001, 1, 0, LONG)
    rows[19] = (20, 1020, 1, 0, LONG + " thanks")  # a near-duplicate of the first
    rows[18] = (19, 1019, 1, 2, text(19))  # a crosspost of the second
    rows[17] = (18, 1018, 1, 777, text(18))  # crossposts of a submission that is not there
    rows[3] = (4, 1004, 1, 777, text(4))
    splits = split_submissions([table(tmp_path / "a", rows)], SplitSettings())
    [part] = splits.parts
    assert [part[n] for n in (0, 19, 1, 18, 3, 17)] == [0] * 6
    assert (splits.groups, splits.grouped, splits.moved) == (3, 6, 3)


def test_short_texts_are_the_same_only_from_one_account() -> None:
    zeros = np.zeros(4, np.uint64)
    exact = np.array([exact_hash("Help please!", name) for name in ("a", "b", "a", "")], np.uint64)
    signatures = np.stack([signature_of("Help please!")] * 4)
    groups = group_submissions(np.arange(1, 5, dtype=np.uint64), zeros, exact, signatures, 0.8)
    assert groups.tolist() == [0, 1, 0, 3]


def test_similarity_decides() -> None:
    words = LONG.split()
    texts = [LONG, " ".join(words[:-1]), " ".join(words[:8] + ["other"] * 9)]
    signatures = np.stack([signature_of(text) for text in texts])
    ids, zeros = np.arange(1, 4, dtype=np.uint64), np.zeros(3, np.uint64)
    assert group_submissions(ids, zeros, zeros, signatures, 0.8).tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("Do not buy this, it is garbage", -1),
        ("It fell apart in a week", -1),
        ("Stay away from that one", -1),
        ("not good", -1),
        ("I love it", 1),
        ("not bad at all", 1),
        ("I don\u2019t regret buying it", 1),
        ("This one: ", 0),
        ("Can\u2019t recommend this one enough", 1),
        ("I couldn't be happier with it", 1),
        ("No issues, love it", 1),
        ("Not only bad but worse", -1),
        ("I can't recommend it", -1),
    ],
)
def test_sentiment(text: str, sign: int) -> None:
    assert np.sign(sentiment(text)) == sign
