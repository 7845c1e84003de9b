"""Which descriptions are unusable: empty ones, loops, the title again, refusals."""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

Flag = Literal["", "empty", "loop", "title", "refusal", "rejected", "failed"]
"""What is wrong with a description; "" for nothing. `rejected`: the server did not accept the request (400, 413, 422).
`failed`: no answer, after all retries."""
NO_TEXT: tuple[Flag, ...] = ("rejected", "failed")
"""Flags without a text: their photos are not described again in the same run."""

_LONGEST_PERIOD = 20
_MOST_EQUAL_SENTENCES = 3
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"[^.!?\n]+")
_CHARACTERS = re.compile(r"(.{4,60}?)\1{5,}", re.DOTALL)
_MOST_CHARACTERS = 20_000
_REFUSAL = re.compile(
    r"\W*(?:(?:i['’]?m|i am) (?:very )?sorry\b|sorry,? (?:but )?i\b|i apologi[sz]e\b|(?:my )?apologies\b|as an ai\b"
    r"|(?:it (?:seems|appears|looks like) (?:that )?)?(?:there (?:is|was) )?no (?:image|photo|picture)s?\b"
    r"(?: \w+){0,2} (?:provided|attached|included|available|uploaded)\b"
    r"|i (?:do not|don['’]t) (?:have the ability|see (?:any|an|the) (?:image|photo|picture))\b"
    r"|(?:unfortunately,? )?i(?:['’]m| am)? (?:can ?not|can['’]t|unable to|not able to|won['’]t)\b)",
    re.IGNORECASE,
)
_FILLERS = frozenset(
    {
        *("a", "an", "and", "are", "image", "in", "is", "it", "of", "on", "photo", "picture", "product"),
        *("showing", "shows", "that", "the", "this", "with"),
    }
)
"""Words that say nothing about a product."""


def check_text(text: str, title: str) -> Flag:
    """What is wrong with a description. One without a single word beyond the item's title describes nothing."""
    words = [word.lower() for word in _WORD.findall(text)]
    if not words:
        return "empty"
    if _REFUSAL.match(text):
        return "refusal"
    if _loops(text[:_MOST_CHARACTERS], words):
        return "loop"
    known = {word.lower() for word in _WORD.findall(title)}
    return "title" if known and set(words) <= known | _FILLERS else ""


def complete_sentences(text: str) -> str:
    """The text up to the end of its last complete sentence; all of it if there is none."""
    text = " ".join(text.split())
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] if end > 0 else text


def _loops(text: str, words: list[str]) -> bool:
    """Whether up to 20 words come four times in a row (one word seven times), or a sentence more than three times."""
    for period in range(1, _LONGEST_PERIOD + 1):
        run = 0
        for now, before in zip(words[period:], words, strict=False):
            run = run + 1 if now == before else 0
            if run >= max(3 * period, 6):
                return True
    sentences = Counter(" ".join(s.split()).lower() for s in _SENTENCE.findall(text) if len(s.split()) > 2)
    if sentences and max(sentences.values()) > _MOST_EQUAL_SENTENCES:
        return True
    return _CHARACTERS.search(text) is not None  # languages without spaces
