"""Every word that is put around a conversation, a title or a photo.

A prompt is a tuple of pieces: our own words (`str`), words from data (`Text`, in which nothing is taken for markup)
and places for photo tokens (`Slot`). The tags are those of LLaVA-v1.6-Mistral, `[INST] ... [/INST]`; the style `lavic`
has the released code's order instead, title before photo and `Assistant:` at the end, in our words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Style = Literal["inst", "lavic"]

VERSION = "1"
"""Of the style `inst`. Kept in bundles, stores and description files: tokens and adapters belong to the words they were
trained with."""

VERSIONS: dict[Style, str] = {"inst": VERSION, "lavic": f"{VERSION}-lavic"}
"""Version of the words of each style."""


@dataclass(frozen=True)
class Text:
    """Words that came from data."""

    text: str


@dataclass(frozen=True)
class Slot:
    """A place for `tokens` vectors of one photo."""

    tokens: int


@dataclass(frozen=True)
class Candidate:
    """One line of the list to choose from."""

    id: str
    title: str
    look: str | None = None
    """Words in the place of the photo's tokens: for the ablation that reads the photo as words."""


Piece = str | Text | Slot

NONE = "none"
"""The answer for a list that holds nothing fitting."""

ROLES = {"seeker": "Seeker", "comment": "Comment"}
"""How the turns of a conversation are introduced."""

TAGS = {"seeker": "submission", "comment": "comment"}
"""How they are enclosed in the style `lavic`."""


def style_of(version: str) -> Style | None:
    """The style of a version; None for a version of another lavic."""
    return next((style for style, known in VERSIONS.items() if known == version), None)


def describe(title: str, photo_tokens: int, style: Style = "inst") -> tuple[Piece, ...]:
    """Asks for a description of one photo, which in `inst` stands before the words as in LLaVA's own training."""
    if style == "lavic":
        task = "Describe how the product on the photo looks, in detail and without repeating its title."
        return f"{task}\nTitle: ", Text(title), "\nPhoto: ", Slot(photo_tokens), "\nAssistant:"
    return "[INST] ", Slot(photo_tokens), "\nTitle: ", Text(title), "\nDescribe how it looks. [/INST]"


def turn(role: str, text: str, style: Style = "inst") -> tuple[Piece, ...]:
    """One turn of a conversation as it stands in `recommend`."""
    if style == "inst":
        return f"{ROLES[role]}: ", Text(text), "\n"
    return f"<{TAGS[role]}>", Text(text), f"</{TAGS[role]}>\n"


def recommend(
    turns: Sequence[tuple[str, str]],
    candidates: Sequence[Candidate],
    *,
    photo_tokens: int | Sequence[int],
    style: Style = "inst",
    none: bool = False,
) -> tuple[Piece, ...]:
    """Asks for the id of the candidate that answers a conversation.

    Args:
        turns: (role, text), oldest first; a role is a key of `ROLES`.
        candidates: The list to choose from, in the order shown.
        photo_tokens: Tokens of each candidate, or of all of them: 5, or 0 for titles only.
        style: Of the words.
        none: Offer `NONE` as the last answer.
    """
    counts = [photo_tokens] * len(candidates) if isinstance(photo_tokens, int) else photo_tokens
    pieces: list[Piece] = ["[INST] " if style == "inst" else "Recommend one of the candidates in this conversation.\n"]
    for role, text in turns:
        pieces += turn(role, text, style)
    pieces.append("Candidates:\n")
    for candidate, count in zip(candidates, counts, strict=True):
        pieces += [Text(candidate.id), ": ", Text(candidate.title)]
        if candidate.look is not None:
            pieces += [", ", Text(candidate.look)]
        elif count:
            pieces += [" ", Slot(count)]
        pieces.append("\n")
    if none:
        pieces.append(f"{NONE}: none of these\n")
    pieces.append("Which ID fits? [/INST]" if style == "inst" else "Answer with one ID and nothing else.\nAssistant:")
    return tuple(pieces)
