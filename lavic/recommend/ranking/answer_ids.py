"""Item ids in a model's words: the released rule for ids of Amazon's form, and whole words for ids of any form."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

RELEASED = re.compile(r"\bB[A-Z0-9]{9}\b")
"""An item id, as the released scripts look for it in generated text."""
_AMAZON = re.compile(r"B[A-Z0-9]{9}")
_WORD = re.compile(r"[A-Za-z0-9_-]+")
_JOINERS = frozenset("-_.")
"""Between two letters they continue a word."""
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


@dataclass(frozen=True, kw_only=True)
class Mention:
    """A place where a text names an item."""

    start: int
    end: int
    item: str


def mentions(text: str, items: Collection[str], *, any_case: bool = False) -> list[Mention]:
    """Where a text names items, in its order.

    An id is named where it is a whole word. Letters and digits continue a word, and so does a single `-`, `_`,
    `.` or other character that ids have, where a letter or digit follows: `B00` is not named in `B00.X`, and is in
    `B00.` Of ids that contain each other the longest counts.

    Args:
        any_case: Whether ASCII letters may be in another case.
    """
    word_characters = _WordCharacters(items)
    folded = _lower(text) if any_case else text
    items_by_form: dict[str, list[str]] = {}
    for item in dict.fromkeys(items):
        if form := item.strip():
            items_by_form.setdefault(_lower(form) if any_case else form, []).append(item)
    spans = sorted(
        (start, -end, form)
        for form in items_by_form
        for start, end in _occurrences(folded, form)
        if word_characters.at(text, start, end)
    )
    named: list[Mention] = []
    reached = 0
    for start, negative_end, form in spans:
        end = -negative_end
        if end <= reached:  # inside of a longer one, which begins no later
            continue
        reached = end
        exact = [item for item in items_by_form[form] if item.strip() == text[start:end]]
        named += [Mention(start=start, end=end, item=item) for item in exact or items_by_form[form]]
    return named


def unlisted(text: str, items: Iterable[str]) -> list[str]:
    """The words of Amazon's form that are none of some ids, in any case of letters."""
    known = {_lower(item) for item in items}
    return [word for word in dict.fromkeys(_AMAZON.findall(text)) if _lower(word) not in known]


def words_in(text: str) -> list[str]:
    """The words of a text, with and without the punctuation around them: what may be an id."""
    words = [form for word in text.split() for form in (word, word.strip(string.punctuation)) if form]
    return list(dict.fromkeys([*words, *_WORD.findall(text)]))


def released_answer(text: str, candidates: Collection[str] = ()) -> str | None:
    """The id that the released scripts read from a text: the first that has Amazon's form.

    Args:
        text: What a model wrote.
        candidates: The list; of these, ids of another form, which the released data does not have, are looked for too.
    """
    match = RELEASED.search(text)
    named = mentions(text, [item for item in candidates if not RELEASED.fullmatch(item)])
    if named and (match is None or (named[0].start, -named[0].end) < (match.start(), -match.end())):
        return named[0].item
    return match[0] if match else None


class _WordCharacters:
    """What words are made of where ids are: ASCII letters and digits, and what the ids have besides."""

    def __init__(self, items: Iterable[str]) -> None:
        id_characters = {character for item in items for character in item if not character.isspace()}
        self._letters = {c for c in id_characters if c.isalnum()} | set(string.ascii_letters + string.digits)
        self._joiners = _JOINERS | {c for c in id_characters if not c.isalnum()}

    def at(self, text: str, start: int, end: int) -> bool:
        """Whether a word begins and ends there."""
        return not self._continues(text[max(0, start - 2) : start][::-1]) and not self._continues(text[end : end + 2])

    def _continues(self, beside: str) -> bool:
        """Whether a word continues with the two adjacent characters, the nearest first."""
        if beside[:1] in self._letters:
            return True
        return len(beside) == 2 and beside[0] in self._joiners and beside[1] in self._letters


def _occurrences(text: str, form: str) -> Iterator[tuple[int, int]]:
    start = text.find(form)
    while start >= 0:
        yield start, start + len(form)
        start = text.find(form, start + 1)


def _lower(text: str) -> str:
    """ASCII letters in lower case; no other rule keeps every character's place."""
    return text.translate(_LOWER)
