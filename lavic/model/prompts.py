"""The prompts: every text around a conversation, a title or a photo.

A prompt is a tuple of pieces: our text (`str`), text from data (`Text`, never parsed as markup) and slots for photo
tokens (`Slot`). The tags around it are those of the base model's chat template (`lavic.model.chat_template`), such as
`[INST] ... [/INST]` for LLaVA-v1.6-Mistral. The style `lavic` has the order of the released code instead: the title
before the photo, and `Assistant:` at the end.
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
"""Version of the prompts in the style `inst` with Mistral's tags."""


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The tags of a chat template around a single user message."""

    photo_prefix: str
    """Before the photo, in a message that begins with a photo."""
    photo_suffix: str
    """Between that photo and the text."""
    prefix: str
    """Before the text, in a message without a photo."""
    suffix: str
    """After the text, up to the start of the model's answer."""
    end: str | None = None
    """The token that ends an answer; None: the tokenizer's end-of-sequence token."""

    @property
    def marks(self) -> set[str]:
        """Role tags, such as `[INST]` or `USER:`, which text from data must not contain."""
        words = {word for text in (self.photo_prefix, self.prefix) for word in text.split()[-1:]}
        return {word for word in (*words, *self.suffix.split()) if not word.isalnum() and len(word) > 1}


MISTRAL = ChatFormat(photo_prefix="[INST] ", photo_suffix="\n", prefix="[INST] ", suffix=" [/INST]")
"""The format of LLaVA-v1.6-Mistral-7B and of the miniature."""


@dataclass(frozen=True)
class Text:
    """Text from data."""

    text: str


@dataclass(frozen=True)
class Slot:
    """A slot for `tokens` vectors of one photo."""

    tokens: int


@dataclass(frozen=True)
class Candidate:
    """One line of the candidate list."""

    id: str
    title: str
    look: str | None = None
    """Text instead of the photo's tokens, for the ablation that describes the photo in words."""


Piece = str | Text | Slot

NONE = "none"
"""The answer for a list without a fitting candidate."""

ROLES = {"seeker": "Seeker", "comment": "Comment"}
"""Prefix of a turn, by role."""

TAGS = {"seeker": "submission", "comment": "comment"}
"""Tag of a turn in the style `lavic`, by role."""


def version_of(style: Style, chat: ChatFormat = MISTRAL) -> str:
    """Version of a style's prompts and tags.

    Bundles, stores and descriptions record it: adapters and tokens work with the prompts of their training.
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
    """The prompt for a description of one photo; in `inst` the photo comes first, as in LLaVA's training.

    Args:
        chat: Tags of the base model, used in `inst` alone.
        words: The user's question instead of ours, split at the title.
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
    """One turn of a conversation in `recommend`."""
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
    """The prompt for the id of the candidate to recommend in a conversation.

    Args:
        turns: (role, text), oldest first; a role is a key of `ROLES`.
        candidates: The list, in the order shown.
        photo_tokens: Tokens of each candidate, or one number for all: 5, or 0 for titles only.
        style: Of the prompt.
        chat: Tags of the base model, used in `inst` alone.
        none: Whether to add `NONE` as the last answer.
    """
    counts = [photo_tokens] * len(candidates) if isinstance(photo_tokens, int) else photo_tokens
    pieces: list[Piece] = [
        chat.prefix if style == "inst" else "Recommend one of the candidates in this conversation.\n"
    ]
    for role, text in turns:
        pieces += turn(role, text, style)
    pieces.append("Candidates:\n")
    for candidate, count in zip(candidates, counts, strict=True):
        pieces += [Text(candidate.id), ": ", Text(_one_line(candidate.title))]
        if candidate.look is not None:
            pieces += [", ", Text(_one_line(candidate.look))]
        elif count:
            pieces += [" ", Slot(count)]
        pieces.append("\n")
    if none:
        pieces.append(f"{NONE}: none of these\n")
    question = f"Which ID fits?{chat.suffix}" if style == "inst" else "Answer with one ID and nothing else.\nAssistant:"
    return *pieces, question


def _one_line(text: str) -> str:
    """Text without line ends, so that no title looks like further lines of the list."""
    lines = text.splitlines()
    return text if lines == [text] else " ".join(map(str.strip, lines))
