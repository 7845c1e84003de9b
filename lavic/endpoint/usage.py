"""What requests to a model took: tokens, cost, faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Usage:
    """Counts of one client. Answers from the cache are counted apart: they cost nothing."""

    input_price: float | None = None
    """Price of a million tokens; so `output_price`."""
    output_price: float | None = None
    requests: int = 0
    """Answered by a server."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_requests: int = 0
    cached_prompt_tokens: int = 0
    cached_completion_tokens: int = 0
    without_usage: int = 0
    """Answers whose server did not say how many tokens they took."""
    faults: Counter[str] = field(default_factory=Counter)
    """Faults by kind, with those that were retried."""
    failed: Counter[str] = field(default_factory=Counter)
    """Requests without an answer after all retries, by the kind of their last fault."""

    def add(self, prompt: int, completion: int, *, cached: bool) -> None:
        """Counts an answer with its tokens."""
        if cached:
            self.cached_requests += 1
            self.cached_prompt_tokens += prompt
            self.cached_completion_tokens += completion
            return
        self.requests += 1
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.without_usage += not prompt

    @property
    def cost(self) -> float | None:
        """Cost of the answers that servers gave; None without prices."""
        return self._cost(self.prompt_tokens, self.completion_tokens)

    @property
    def cached_cost(self) -> float | None:
        """What the answers from the cache had cost."""
        return self._cost(self.cached_prompt_tokens, self.cached_completion_tokens)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": self.cost,
            "cached": {
                "requests": self.cached_requests,
                "prompt_tokens": self.cached_prompt_tokens,
                "completion_tokens": self.cached_completion_tokens,
                "cost": self.cached_cost,
            },
            "without_usage": self.without_usage,
            "faults": dict(sorted(self.faults.items())),
            "failed": dict(sorted(self.failed.items())),
        }

    def _cost(self, prompt: int, completion: int) -> float | None:
        if self.input_price is None and self.output_price is None:
            return None
        return (prompt * (self.input_price or 0.0) + completion * (self.output_price or 0.0)) / 1e6
