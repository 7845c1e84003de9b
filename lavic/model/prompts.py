"""Every word that is put around a conversation, a title or a photo.

A prompt is a tuple of pieces: our own words (`str`), words from data (`Text`, in which nothing is taken for markup)
and places for photo tokens (`Slot`). The tags around it are those of the base model's own chat template
(`lavic.model.chat_template`), `[INST] ... [/INST]` for LLaVA-v1.6-Mistral; the style `lavic`
has the released code's order instead, title before photo and `Assistant:` at the end, in our words.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Style = Literal["inst", "lavic"]

VERSION = "1"
"""Of our words, in the style `inst` and with Mistral's tags."""


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """What a chat template puts around the one message that a prompt is."""

    photo_prefix: str
    """Before the photo, in a message that begins with one."""
    photo_suffix: str
    """Between that photo and the words behind it."""
    prefix: str
    """Before the words, in a message of words."""
    suffix: str
    """Behind the words, up to where the model's answer begins."""
    end: str | None = None
    """The token that ends an answer; None: the tokenizer's end-of-sequence token."""

    @property
    def marks(self) -> set[str]:
        """Role tags, such as `[INST]` or `USER:`, which words from data must not hold."""
        words = {word for text in (self.photo_prefix, self.prefix) for word in text.split()[-1:]}
        return {word for word in (*words, *self.suffix.split()) if not word.isalnum() and len(word) > 1}


MISTRAL = ChatFormat(photo_prefix="[INST] ", photo_suffix="\n", prefix="[INST] ", suffix=" [/INST]")
"""Of LLaVA-v1.6-Mistral-7B and of the miniature."""


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


def version_of(style: Style, chat: ChatFormat = MISTRAL) -> str:
    """Version of a style's words and tags.

    Kept in bundles, stores and description files: tokens and adapters belong to the words they were trained with.
    """
    if style == "lavic":
        return f"{VERSION}-lavic"
    if chat == MISTRAL:
        return VERSION
    return f"{VERSION}-{hashlib.sha256(json.dumps(asdict(chat), sort_keys=True).encode()).hexdigest()[:8]}"


def style_of(version: str) -> Style | None:
    """The style of a version; None for a version of another lavic."""
    if version == version_of("lavic"):
        return "lavic"
    return "inst" if re.fullmatch(rf"{VERSION}(-[0-9a-f]{{8}})?", version) else None


def describe(
    title: str,
    photo_tokens: int,
    style: Style = "inst",
    chat: ChatFormat = MISTRAL,
    words: Sequence[str] | None = None,
) -> tuple[Piece, ...]:
    """Asks for a description of one photo, which in `inst` stands before the words as in LLaVA's own training.

    Args:
        title: Of the item.
        photo_tokens: Tokens of the photo.
        style: Of the words.
        chat: Tags of the base model, which only `inst` has.
        words: A question of the user's in place of ours, cut where the title stands.
    """
    if words is not None:
        question: list[Piece] = []
        for part in words:
            question += [Text(title), part] if question else [part]
        if style == "lavic":
            return *question, "\nPhoto: ", Slot(photo_tokens), "\nAssistant:"
        return chat.photo_prefix, Slot(photo_tokens), chat.photo_suffix, *question, chat.suffix
    if style == "lavic":
        task = "Describe how the product on the photo looks, in detail and without repeating its title."
        return f"{task}\nTitle: ", Text(title), "\nPhoto: ", Slot(photo_tokens), "\nAssistant:"
    task = f"\nDescribe how it looks.{chat.suffix}"
    return chat.photo_prefix, Slot(photo_tokens), f"{chat.photo_suffix}Title: ", Text(title), task


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
    chat: ChatFormat = MISTRAL,
    none: bool = False,
) -> tuple[Piece, ...]:
    """Asks for the id of the candidate that answers a conversation.

    Args:
        turns: (role, text), oldest first; a role is a key of `ROLES`.
        candidates: The list to choose from, in the order shown.
        photo_tokens: Tokens of each candidate, or of all of them: 5, or 0 for titles only.
        style: Of the words.
        chat: Tags of the base model, which only `inst` has.
        none: Offer `NONE` as the last answer.
    """
    counts = [photo_tokens] * len(candidates) if isinstance(photo_tokens, int) else photo_tokens
    pieces: list[Piece] = [
        chat.prefix if style == "inst" else "Recommend one of the candidates in this conversation.\n"
    ]
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
    asked = f"Which ID fits?{chat.suffix}" if style == "inst" else "Answer with one ID and nothing else.\nAssistant:"
    pieces.append(asked)
    return tuple(pieces)
