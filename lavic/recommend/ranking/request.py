"""Requests to a ranker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lavic.data.schema import Conversation


@dataclass(frozen=True, kw_only=True)
class Request:
    """A conversation and the list to rank."""

    conversation: Conversation
    candidates: tuple[str, ...]
    """Item ids in prompt order, without repeats."""
    tokens_of: Mapping[str, str] | None = None
    """Candidate -> the item whose tokens follow its title; None: its own. For the shuffled control."""
    texts: Mapping[str, str] | None = None
    """Candidate -> text that replaces its tokens. For the control that reads the photo as text."""
    max_title: int | None = None
    """Characters of a title that are shown; None: all."""


@dataclass(frozen=True)
class EncodedRequest:
    """A tokenized request."""

    request: Request
    candidates: tuple[str, ...]
    prompt: list[int]
    targets: list[list[int]]
    """The tokens of each candidate's id, and of "none" if it is an answer, each with the end-of-sequence token."""

    @property
    def length(self) -> int:
        """Input tokens; the last token of each target is only predicted."""
        return len(self.prompt) + sum(len(target) - 1 for target in self.targets)
