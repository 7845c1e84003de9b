"""Examples and batches with label masks: only target tokens are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORED = -100
"""Label of a token that is not learnt."""


@dataclass(frozen=True)
class Example:
    """One prompt, with its target where there is one."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`: the token itself on the target, `IGNORED` on the prompt."""


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right.

    Attention is causal, so no token before the padding sees it: a batch needs no attention mask, and an example's
    values do not depend on its batch-mates.
    """

    input_ids: torch.Tensor
    """int64 [b, length]"""
    labels: torch.Tensor
    """int64 [b, length]"""
    lengths: torch.Tensor
    """int64 [b], tokens before the padding"""

    @property
    def targets(self) -> int:
        """How many tokens are learnt."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in (self.input_ids, self.labels, self.lengths)))


def masked_example(prompt: Sequence[int], target: Sequence[int]) -> Example:
    """Token ids of prompt and target, with labels on the target alone."""
    return Example([*prompt, *target], [*[IGNORED] * len(prompt), *target])


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Pads examples on the right to the longest of them."""
    longest = max(len(e.input_ids) for e in examples)
    ids = torch.full((len(examples), longest), pad, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, e in enumerate(examples):
        ids[row, : len(e.input_ids)] = torch.tensor(e.input_ids)
        labels[row, : len(e.labels)] = torch.tensor(e.labels)
    return Batch(ids, labels, torch.tensor([len(e.input_ids) for e in examples]))
