"""What a teacher is: it writes a description of each photo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from lavic.data.tar_shards import Sample
from lavic.shards.teacher.text_check import Flag


@dataclass(frozen=True, kw_only=True)
class Written:
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

    def write(self, samples: Iterable[Sample], attempt: int, stopped: Callable[[], bool]) -> Iterator[Written]:
        """A description of each sample, in order.

        Args:
            samples: The photos, drawn as they are needed.
            attempt: 0, or 1 for photos whose first text was no use: it is written in another way.
            stopped: Asked while it waits; the last answers are left out when it is true.
        """
        ...
