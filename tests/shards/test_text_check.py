"""Which descriptions are flagged, and where a truncated one ends."""

from __future__ import annotations

import pytest

from lavic.shards.teacher.text_check import check_text, complete_sentences

TITLE = "Acme Striped Mug, 300 ml"


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("A white mug with thin blue stripes and a round handle.", ""),
        ("A very, very, very long scarf; it is very soft.", ""),
        ("Red red red red.", ""),
        ("The left one is red. The right one is red. The middle one is blue.", ""),
        ("", "empty"),
        (" .\n", "empty"),
        ("<image>", "title"),
        ("I'm sorry, but I can't describe this.", "refusal"),
        ("I’m sorry, I cannot see it", "refusal"),
        ("I cannot assist with that request.", "refusal"),
        ("Unfortunately, I am unable to view images.", "refusal"),
        ("As an AI language model, I have no eyes.", "refusal"),
        ("Apologies, but I can't.", "refusal"),
        ("It seems that no image was provided.", "refusal"),
        ("I don't see any image attached.", "refusal"),
        ("No photo of a cup: the mug is a drawn one.", ""),
        ("A mug that says: I can't function before coffee.", ""),
        ("blue " * 12, "loop"),
        ("A mug with a handle and " + "a handle and " * 4, "loop"),
        ("It is blue and round. It has a handle. " * 4, "loop"),
        ("一只白色的杯子" * 8, "loop"),
        ("Acme Striped Mug, 300 ml", "title"),
        ("This is the Acme striped mug.", "title"),
        ("The Acme mug is white.", ""),
    ],
)
def test_flags(text, flag):
    assert check_text(text, TITLE) == flag


def test_an_item_without_a_title():
    assert check_text("A mug.", "") == ""


def test_a_long_text_takes_no_time():
    assert check_text(" ".join(map(str, range(50_000))), TITLE) == ""


def test_a_truncated_description_ends_at_its_last_complete_sentence() -> None:
    assert complete_sentences("A red bag. It has a") == "A red bag."
    assert complete_sentences("A red bag with  a\nhandle") == "A red bag with a handle"
