"""Item ids in a text: ids of any form, but never a part of another id."""

from __future__ import annotations

import random
import string

import pytest

from lavic.evaluation.chat import parse_answer
from lavic.recommend.ranking.answer_ids import mentions, released_answer, words_in

DOTTED = ["B00", "B00.X", "B00.X.1", "B01.X"]


@pytest.mark.parametrize(
    ("text", "items", "expected"),
    [
        ("B00.X", DOTTED, ["B00.X"]),
        ("The best is B00.X.", DOTTED, ["B00.X"]),
        ("**B00.X.1**", DOTTED, ["B00.X.1"]),
        ("B00.", DOTTED, ["B00"]),
        ("B00, then B01.X", DOTTED, ["B00", "B01.X"]),
        ("B00.Y", DOTTED, []),
        ("B00.XY B00.X-1 B00.X_1 AB00.X 1.B00.X", DOTTED, []),
        ("(B00.X)/[B00]", DOTTED, ["B00.X", "B00"]),
        ("B00.X:mug", DOTTED, ["B00.X"]),
        ("B00.Y", ["B00"], []),
        ("a/b", ["a/b", "a", "b"], ["a/b"]),
        ("a/c", ["a/b", "a", "c"], []),
        ("a/c", ["a", "c"], ["a", "c"]),
        ("red mug and blue mug", ["red mug", "mug", "blue"], ["red mug", "blue", "mug"]),
        ("../../etc/passwd", ["../../etc/passwd", "etc"], ["../../etc/passwd"]),
        ("I take C++.", ["C", "C++", "C+"], ["C++"]),
        ("naïve é", ["é"], ["é"]),
        ("选B00.X。", DOTTED, ["B00.X"]),
        (" x ", ["", " ", " x"], [" x"]),
        ("half \ud83d a pair", ["\ud83d"], ["\ud83d"]),
    ],
)
def test_mentions_finds_complete_ids_only(text: str, items: list[str], expected: list[str]):
    assert [mention.item for mention in mentions(text, items)] == expected
    assert all(text[mention.start : mention.end] == mention.item.strip() for mention in mentions(text, items))


@pytest.mark.slow
def test_random_ids_are_found_and_their_parts_are_not():
    rng = random.Random(0)
    for _ in range(1000):
        ids = {
            rng.choice("Ab1") + "".join(rng.choices("A1._-/:#+é ", k=rng.randint(0, 5))) + rng.choice("Ab1é")
            for _ in range(8)
        }
        for item in ids:
            for text in (item, f"I take: {item}.", f"**{item}**", f'"{item}"\n', f"{item}, as it fits"):
                assert [mention.item for mention in mentions(text, ids)] == [item], (text, ids)
                assert item not in [mention.item for mention in mentions(text, ids - {item})]
            for joiner in "._-":
                assert item not in [mention.item for mention in mentions(f"{item}{joiner}Z9", ids)]
                assert item not in [mention.item for mention in mentions(f"Z9{joiner}{item}", ids)]


@pytest.mark.parametrize(
    ("text", "ids", "kind"),
    [
        ("b00.x", ("B00.X",), "listed"),
        ("B00.X or B00.x", ("B00.X",), "listed"),
        ("B00.X or B01.X", (), "several"),
        ("B00.Z", (), "no_id"),
        ("B00.X, not B0ZZZZZZZZ", (), "several"),
        ("B0ZZZZZZZZ.", ("B0ZZZZZZZZ",), "unlisted"),
        ("B0ZZZZZZZZ.X", (), "no_id"),
    ],
)
def test_parse_answer_with_dotted_ids(text: str, ids: tuple[str, ...], kind: str):
    assert parse_answer(text, DOTTED) == (ids, kind)


def test_ids_that_differ_only_in_case():
    assert parse_answer("it is aB", ["ab", "aB"]) == (("aB",), "listed")
    assert parse_answer("it is AB", ["ab", "aB"]) == ((), "several")
    assert parse_answer("it is İ or ß", ["i", "ss"]) == ((), "no_id")


def test_released_answer_does_not_depend_on_listed_asins():
    ids = ["B000000001", "B000000002"]
    for text in ("B000000002!", "xB000000002", "B0000000021 B000000001", "B000000009.X", "none", "b000000001"):
        assert released_answer(text, ids) == released_answer(text)
    assert released_answer("B000000009.X") == "B000000009"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The mug B00.X, or B000000001", "B00.X"),
        ("B000000001, or B00.X", "B000000001"),
        ("B012345678.X", "B012345678.X"),
        ("B012345678.Y", "B012345678"),  # as released: a word ends at the point
        ("x-B012345678", "x-B012345678"),
        ("B00.Y", None),
        ("b00.x", None),
    ],
)
def test_released_answer_finds_listed_ids_of_other_forms(text: str, answer: str | None):
    assert released_answer(text, ["B00", "B00.X", "B012345678.X", "x-B012345678", "B000000001"]) == answer


def test_words_in_gives_words_with_and_without_punctuation():
    assert {"B00.X", "x/1", "B00"} <= set(words_in('Take "B00.X", or (x/1).'))
    assert words_in(f" {string.punctuation} ") == [string.punctuation, "-", "_"]
