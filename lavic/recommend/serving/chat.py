"""An answer in the form of the OpenAI chat API: words for people, and the items beside them for programs."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator
from typing import Any

from lavic.recommend.serving.schemas import RecommendResponse, ScoredItem

_MARKS = re.compile(r"([\\`*_{}\[\]()#+!|<>~&])")
"""What markdown would take for formatting, links or markup."""

MODEL: dict[str, Any] = {"id": "lavic", "object": "model", "created": 0, "owned_by": "lavic"}
"""The model, as the API lists it."""
_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
"""Tokens are not counted: an answer is ranked, not generated."""

INTRODUCTION = "These fit best:\n\n"
NOTHING = "Nothing in the catalogue fits."


def completion(answer: RecommendResponse, model: str, base_url: str | None) -> dict[str, Any]:
    """A whole answer.

    Args:
        answer: The recommendation; it stands whole under `lavic` of the message.
        model: What the client called the model.
        base_url: Of the server, for links to photos; None: without photos.
    """
    message = {
        "role": "assistant",
        "content": "".join(lines(answer, base_url)),
        "lavic": answer.model_dump(mode="json"),
    }
    return {
        **_head("chat.completion", model),
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": _USAGE,
    }


def chunks(
    answer: RecommendResponse, model: str, base_url: str | None, *, include_usage: bool = False
) -> Iterator[str]:
    """The same as server-sent events: the role, a chunk for each line, the items with the last one.

    With `include_usage` one more chunk follows, which has `usage` and no choices.
    """
    head = _head("chat.completion.chunk", model) | ({"usage": None} if include_usage else {})

    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    for line in lines(answer, base_url):
        yield event({"content": line})
    yield event({"lavic": answer.model_dump(mode="json")}, "stop")
    if include_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': _USAGE})}\n\n"
    yield "data: [DONE]\n\n"


def lines(answer: RecommendResponse, base_url: str | None) -> Iterator[str]:
    """The answer as markdown, a line for each item."""
    if not answer.items:
        yield NOTHING
        return
    yield INTRODUCTION
    for rank, item in enumerate(answer.items, 1):
        yield _line(rank, item, base_url)


def _line(rank: int, item: ScoredItem, base_url: str | None) -> str:
    title = _plain(item.title) or item.id
    photo = f"![{title}]({base_url}{item.photo}) " if base_url and item.photo else ""
    return f"{rank}. {photo}**{title}** ({_plain(item.id)}), {item.probability:.1%}\n"


def _plain(text: str) -> str:
    """Words from data in which markdown finds nothing."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
