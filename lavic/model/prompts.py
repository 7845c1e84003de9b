"""Every word that is put around a conversation, a title or a photo.

A prompt is a tuple of pieces: our own words (`str`), words from data (`Text`, in which nothing is taken for markup)
and places for photo tokens (`Slot`). The tags are those of LLaVA-v1.6-Mistral, `[INST] ... [/INST]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

VERSION = "1"
"""Kept in bundles, stores and description files: tokens and adapters belong to the words they were trained with."""


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

ROLES = {"seeker": "Seeker", "comment": "Comment"}
"""How the turns of a conversation are introduced."""


def describe(title: str, photo_tokens: int) -> tuple[Piece, ...]:
    """Asks for a description of one photo, which stands before the words as in LLaVA's own training."""
    return "[INST] ", Slot(photo_tokens), "\nTitle: ", Text(title), "\nDescribe how it looks. [/INST]"


def recommend(
    turns: Sequence[tuple[str, str]], candidates: Sequence[Candidate], *, photo_tokens: int
) -> tuple[Piece, ...]:
    """Asks for the id of the candidate that answers a conversation.

    Args:
        turns: (role, text), oldest first; a role is a key of `ROLES`.
        candidates: The list to choose from, in the order shown.
        photo_tokens: Tokens per candidate: 5, or 0 for titles only.
    """
    pieces: list[Piece] = ["[INST] "]
    for role, text in turns:
        pieces += [f"{ROLES[role]}: ", Text(text), "\n"]
    pieces.append("Candidates:\n")
    for candidate in candidates:
        pieces += [Text(candidate.id), ": ", Text(candidate.title)]
        if candidate.look is not None:
            pieces += [", ", Text(candidate.look)]
        elif photo_tokens:
            pieces += [" ", Slot(photo_tokens)]
        pieces.append("\n")
    pieces.append("Which ID fits? [/INST]")
    return tuple(pieces)
