"""Pairs of conversation and target, as rows of the feature tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lavic.data.schema import Conversation


@dataclass(frozen=True)
class Pairs:
    """One pair for each target of each conversation."""

    query: torch.Tensor
    """int64 [pairs], row of the conversation's features."""
    item: torch.Tensor
    """int64 [pairs], row of the target's features."""
    targets: tuple[frozenset[int], ...]
    """For each conversation the rows of its targets' features."""

    @classmethod
    def of(cls, conversations: Sequence[Conversation], rows: Mapping[str, int]) -> Pairs:
        """The pairs of some conversations.

        Args:
            conversations: Each with a row of features, in this order.
            rows: Item id -> row of its features, for every target.
        """
        targets = [tuple(dict.fromkeys(rows[id] for id in c.targets)) for c in conversations]
        return cls(
            query=torch.tensor([row for row, items in enumerate(targets) for _ in items], dtype=torch.long),
            item=torch.tensor([item for items in targets for item in items], dtype=torch.long),
            targets=tuple(frozenset(items) for items in targets),
        )

    def __len__(self) -> int:
        return len(self.query)

    def without(self, left_out: Sequence[bool]) -> Pairs:
        """The pairs of the conversations that are not left out."""
        keep = ~torch.tensor(left_out, dtype=torch.bool)[self.query]
        return Pairs(self.query[keep], self.item[keep], self.targets)

    def right_answers(self, batch: torch.Tensor) -> torch.Tensor:
        """Which items of a batch (int64 [b], positions of pairs) answer which of its conversations: bool [b, b]."""
        items = self.item[batch].numpy()
        answers = np.zeros((len(batch), len(batch)), bool)
        for row, query in enumerate(self.query[batch].tolist()):
            targets = self.targets[query]
            answers[row] = np.isin(items, list(targets)) if len(targets) > 1 else items == next(iter(targets))
        return torch.from_numpy(answers)
