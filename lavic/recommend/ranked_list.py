"""The ranking of one candidate list, by a model or by anything else."""

from __future__ import annotations

import re
from dataclasses import dataclass

ID_SHAPE = re.compile(r"\bB[A-Z0-9]{9}\b")
"""An item id, as the released scripts look for in generated text."""


@dataclass(frozen=True, kw_only=True)
class RankedList:
    """A ranking, and what is known about it."""

    ids: tuple[str, ...]
    """Best first. All candidates when ranking; the generated id, or none, when generating."""
    logprobs: tuple[float, ...] = ()
    """Log-probability (natural) of each id with the end-of-sequence token."""
    probabilities: tuple[float, ...] = ()
    """The probabilities, normalized over the list."""
    scores: tuple[float, ...] = ()
    """Any other score of each id, highest first. Equal scores, or else equal log-probabilities, are ties; without
    either, the order has no ties."""
    text: str | None = None
    """The generated text."""
    answer: str | None = None
    """The id that the released scripts read from `text` (see `released_answer`)."""
    none: float | None = None
    """Probability of "none of these", normalized together with the list, if the bundle was tuned with this answer."""


def released_answer(text: str) -> str | None:
    """The id that the released scripts read from a generated text: the first that has the shape of an ASIN."""
    match = ID_SHAPE.search(text)
    return match[0] if match else None
