"""How the teacher's words are drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace

_RETRY_TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature 0 takes the likeliest word each time."""

    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0

    @property
    def text(self) -> str:
        """For the sidecars."""
        if not self.temperature:
            return "greedy"
        top_p = "" if self.top_p is None else f" top_p={self.top_p:g}"
        return f"temperature={self.temperature:g}{top_p} seed={self.seed}"

    def of_attempt(self, attempt: int) -> Sampling:
        """For a text that is written again: at least temperature 0.7, and another seed."""
        if not attempt:
            return self
        return replace(self, temperature=max(self.temperature, _RETRY_TEMPERATURE), seed=self.seed + attempt)
