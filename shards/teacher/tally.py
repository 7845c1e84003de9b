"""What a run of `lavic describe` has done: counts by flag, speed, tokens, cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from lavic.endpoint.usage import Usage
from lavic.shards.teacher.teacher import Description

MILLION = 1_000_000


@dataclass
class Tally:
    """Counts of one rank."""

    flags: Counter[str] = field(default_factory=Counter)
    """Texts by flag; "" for usable ones."""
    retried: int = 0
    """Texts that were written a second time."""
    described: int = 0
    """Photos described in this run."""
    seconds: float = 0.0
    usage: Usage | None = None
    """Usage of an endpoint."""

    def add(self, texts: Mapping[str, Description], *, retried: int, described: int, seconds: float) -> None:
        """Counts a shard."""
        self.flags.update(text.flag for text in texts.values())
        self.retried += retried
        self.described += described
        self.seconds += seconds

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 1 where photos got no answer."""
        return int(self.flags["failed"] > 0)

    def lines(self) -> dict[str, str]:
        """The figures, by name."""
        flagged = {flag: count for flag, count in sorted(self.flags.items()) if flag}
        lines = {
            "Texts": f"{sum(self.flags.values()):,}",
            "Flagged": ", ".join(f"{count:,} {flag}" for flag, count in flagged.items()) or "none",
            "Written twice": f"{self.retried:,}",
        }
        if self.described and self.seconds:
            speed = self.described / self.seconds
            hours = MILLION / speed / 3600
            lines["Speed"] = f"{speed:.3g} photos/s, {hours:.3g} hours for a million photos at this rate"
        if self.usage is not None:
            usage = self.usage
            answered = usage.requests + usage.cached_requests
            lines["Tokens"] = f"{usage.prompt_tokens:,} in, {usage.completion_tokens:,} out, {usage.requests:,} answers"
            if usage.cached_requests:
                lines["From the cache"] = f"{usage.cached_requests:,} of {answered:,} answers"
            if usage.cost is not None and usage.cached_cost is not None and self.described:
                per_million = (usage.cost + usage.cached_cost) / self.described * MILLION
                lines["Cost"] = f"{usage.cost:.4g}; {per_million:,.0f} for a million photos, second tries included"
            if usage.faults:
                lines["Faults"] = ", ".join(f"{count:,} {kind}" for kind, count in sorted(usage.faults.items()))
        return lines

    def summary(self) -> str:
        """For the terminal."""
        text = "\n".join(f"{name:<15}{value}" for name, value in self.lines().items())
        if not self.exit_code:
            return text
        return f"{text}\n{self.flags['failed']:,} photos got no answer: run the same command again to ask for them"
