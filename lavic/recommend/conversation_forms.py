"""The forms in which a program gives a conversation: text, a list of turns, or chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lavic.data.schema import Conversation, Turn, as_text, turns_of
from lavic.errors import DataError

SEEKERS = ("user", "seeker")
"""Roles of who looks for a product."""
OTHERS = ("assistant", "comment")
"""Roles of who answers."""
INSTRUCTIONS = ("system", "developer")
"""Roles whose messages are for another kind of model, and are left out."""

ConversationForm = Conversation | str | Sequence[str | Turn | Mapping[str, Any]]
"""Text (with optional `<submission>` and `<comment>` tags), turns as texts (the first is the seeker's), or chat
messages with `role` and `content`."""


def to_conversation(form: ConversationForm, name: str = "conversation") -> Conversation:
    """Reads a conversation in any of its forms; error messages call it `name`.

    As in the training data, the seeker's first message is the request and all later messages are comments: a
    conversation that is too long loses its oldest comments and keeps the request.

    Raises:
        DataError: It has no words of a seeker, or a turn is of another form.
    """
    if isinstance(form, Conversation):
        return form
    if isinstance(form, str):
        turns = turns_of(as_text(form))
    elif isinstance(form, Sequence):
        turns = tuple(_turns(form, name))
    else:
        raise DataError(f"{name}: {type(form).__name__} where text or a list of turns was expected")
    if not turns:
        raise DataError(f"{name}: empty; write what you are looking for")
    if all(turn.role != "seeker" for turn in turns):
        raise DataError(f"{name}: no message of a user; write what you are looking for")
    return Conversation(id=name, turns=turns, file=name)


def _turns(messages: Sequence[str | Turn | Mapping[str, Any]], name: str) -> list[Turn]:
    turns: list[Turn] = []
    has_request = False
    for number, message in enumerate(messages):
        location = f"{name}[{number}]"
        if isinstance(message, str):
            from_seeker, text = not turns, as_text(message)
        elif isinstance(message, Turn):
            from_seeker, text = message.role == "seeker", as_text(message.text)
        elif isinstance(message, Mapping):
            role = message.get("role")
            if role in INSTRUCTIONS:
                continue
            if role not in (*SEEKERS, *OTHERS):
                raise DataError(
                    f"{location}: role {role!r}; use one of {', '.join((*SEEKERS, *OTHERS, *INSTRUCTIONS))}"
                )
            from_seeker, text = role in SEEKERS, _content(message.get("content"), location)
        else:
            raise DataError(f"{location}: {type(message).__name__} where text or a message was expected")
        if text:
            turns.append(Turn("seeker" if from_seeker and not has_request else "comment", text))
            has_request = has_request or from_seeker
    return turns


def _content(content: Any, location: str) -> str:
    """The words of a chat message: text, or a list of parts of type `text`."""
    if content is None or isinstance(content, str):
        return as_text(content)
    if not isinstance(content, Sequence):
        raise DataError(f"{location}: `content` is neither text nor a list of parts")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{location}: a part of `content` is not text; only words are read")
        texts.append(part["text"])
    return as_text("\n".join(texts))
