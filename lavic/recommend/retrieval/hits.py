"""The items that a search returns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Hits:
    """Items with their scores, best first; items of the same score in the order of their ids."""

    ids: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def without(self, ids: Collection[str], k: int) -> Hits:
        """The first `k` of those whose id is not among `ids`."""
        if not ids:
            return Hits(self.ids[:k], self.scores[:k])
        pairs = [pair for pair in zip(self.ids, self.scores, strict=True) if pair[0] not in ids][:k]
        return Hits([id for id, _ in pairs], [score for _, score in pairs])
