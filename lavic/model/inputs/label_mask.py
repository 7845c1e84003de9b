"""Examples and batches with label masks: the loss covers only target tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORED = -100
"""Label of a token outside the loss."""


@dataclass(frozen=True)
class Example:
    """A prompt and its target, if it has one."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`: the target's tokens, `IGNORED` on the prompt."""


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right.

    Causal attention never sees the padding: a batch needs no attention mask, and the results of an example do not
    depend on the rest of the batch.
    """

    input_ids: torch.Tensor
    """int64 [b, length]"""
    labels: torch.Tensor
    """int64 [b, length]"""
    lengths: torch.Tensor
    """int64 [b], tokens before the padding"""

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        return Batch(*(t.to(device, non_blocking=non_blocking) for t in (self.input_ids, self.labels, self.lengths)))


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
