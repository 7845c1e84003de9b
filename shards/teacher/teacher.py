"""What a teacher is: how it samples text, and the descriptions that it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from lavic.data.tar_shards import Sample
from lavic.shards.teacher.text_check import Flag

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

    def for_attempt(self, attempt: int) -> Sampling:
        """For a text that is written again: at least temperature 0.7, and another seed."""
        if not attempt:
            return self
        return replace(self, temperature=max(self.temperature, _RETRY_TEMPERATURE), seed=self.seed + attempt)


@dataclass(frozen=True, kw_only=True)
class Description:
    """One description."""

    text: str
    flag: Flag = ""
    """What is wrong with it."""


class Teacher(Protocol):
    """Writes descriptions.

    Attributes:
        origin: What a description depends on: the fields of `lavic.data.descriptions.ORIGIN`.
        batch_size: Photos that must be given together for the same text.
    """

    origin: Mapping[str, str]
    batch_size: int

    def write(self, samples: Iterable[Sample], attempt: int, stopped: Callable[[], bool]) -> Iterator[Description]:
        """A description of each sample, in order.

        Args:
            samples: The photos, read as they are needed.
            attempt: 0, or 1 for photos whose first text was unusable: it is sampled differently.
            stopped: Called while it waits; the last answers are left out when it is true.
        """
        ...
