"""The ranking of one candidate list, by a model or by anything else."""

from __future__ import annotations

from dataclasses import dataclass


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
