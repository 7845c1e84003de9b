"""Requests for chat completions, and their answers."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lavic.endpoint.faults import Fault
from lavic.endpoint.settings import EndpointSettings

_SURROGATE = re.compile("[\ud800-\udfff]")
_THOUGHTS = re.compile(r"<(think(?:ing)?)>.*?(?:</\1>|\Z)|\[THINK\].*?(?:\[/THINK\]|\Z)", re.DOTALL)
"""What reasoning models write before they answer, where the server leaves it in the text."""
_END_OF_THOUGHTS = re.compile(r"\A.*(?:</think(?:ing)?>|\[/THINK\])", re.DOTALL)
"""Some templates put the opening tag into the prompt."""


@dataclass(frozen=True)
class Photo:
    """An image in a message, sent as a `data:` URL."""

    data: bytes
    """The file: JPEG, PNG or WebP."""
    type: str = "image/jpeg"


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """One question."""

    parts: Sequence[str | Photo]
    """The user's message: texts and photos in order."""
    system: str = ""
    """The system message; empty for none."""
    max_tokens: int | None = None
    """Maximum length of the answer, tokens."""
    temperature: float | None = 0.0
    """None: the server's default; so for `top_p` and `seed`."""
    top_p: float | None = None
    seed: int | None = None
    attempt: int = 0
    """Counts repetitions of the same question: each has an answer of its own in the cache. It is not sent."""

    def body(self, settings: EndpointSettings) -> dict[str, Any]:
        """The JSON object that is sent."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": clean(self.system)}] if self.system else []
        if all(isinstance(part, str) for part in self.parts):
            messages.append({"role": "user", "content": clean("".join(str(part) for part in self.parts))})
        else:
            messages.append({"role": "user", "content": [_content(part) for part in self.parts]})
        body: dict[str, Any] = {"model": settings.model, "messages": messages}
        for name in ("max_tokens", "temperature", "top_p", "seed"):
            body[name] = getattr(self, name)
        body |= settings.extra
        if "max_completion_tokens" in body:
            body.pop("max_tokens", None)
        return {name: value for name, value in body.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ChatAnswer:
    """The answer to one question, or why there is none."""

    text: str = ""
    """Without its thoughts; empty if there is none, or if the model wrote nothing else."""
    finish_reason: str = ""
    """`stop`, `length` (cut at the longest answer), `content_filter`, or what else the server says."""
    refusal: str = ""
    """The model's words where the server marks them as a refusal."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False
    """Whether it came from the cache."""
    fault: Fault | None = None
    """Why there is no answer, after all retries."""


def parse_chat(answer: Any) -> ChatAnswer:
    """The answer in a server's JSON. Raises Fault where it is not of that form."""
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        if isinstance(text, list):  # parts, of some servers
            text = "".join(part["text"] for part in text if part.get("type") in ("text", "output_text"))
        if not isinstance(text, str | None) or not isinstance(refusal, str | None):
            raise TypeError
        finish = str(choice.get("finish_reason") or "")
    except (LookupError, TypeError, AttributeError):
        raise Fault("shape", "answers JSON without choices[0].message.content") from None
    prompt, completion = token_counts(answer)
    return ChatAnswer(
        text=without_thoughts(clean(text or "")),
        finish_reason=finish,
        refusal=clean(refusal or ""),
        prompt_tokens=prompt,
        completion_tokens=completion,
    )


def token_counts(answer: Any) -> tuple[int, int]:
    """The (input, output) tokens that a server says it used; 0 where it does not."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if type(count) is int and count > 0 else 0 for count in counts)
    return prompt, completion


def clean(text: str) -> str:
    """The text without lone surrogates, which are no characters and which servers refuse."""
    return _SURROGATE.sub("\ufffd", text)


def without_thoughts(text: str) -> str:
    """An answer without what a reasoning model has written before it; empty where it only thinks."""
    answer = _END_OF_THOUGHTS.sub("", _THOUGHTS.sub("", text))
    return text if answer == text else answer.strip()


def _content(part: str | Photo) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": clean(part)}
    data = base64.b64encode(part.data).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:{part.type};base64,{data}"}}
