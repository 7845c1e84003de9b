"""Samples and batches of both stages: prompts and targets, collated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from typing_extensions import Self

from lavic.model.inputs.label_mask import IGNORED, Batch, Example, collate
from lavic.model.inputs.prompt_encoder import Encoder


@dataclass(frozen=True)
class Sample:
    """One example before it is collated; each stage adds its photos or items."""

    key: str
    """Its name in messages."""
    example: Example
    """Its tokenized prompt and target."""

    @property
    def length(self) -> int:
        """Tokens: samples of similar length share a micro-batch."""
        return len(self.example.input_ids)


@dataclass(frozen=True)
class MicroBatch:
    """The input of a task's forward pass: prompts with their targets; each stage adds its photos or items."""

    keys: tuple[str, ...]
    """Each sample's name in messages."""
    targets: tuple[int, ...]
    """Target tokens of each sample."""
    lengths: tuple[int, ...]
    """Tokens of each sample."""
    text: Batch

    @property
    def tokens(self) -> int:
        """Tokens of all samples, without padding."""
        return sum(self.lengths)

    @property
    def padded(self) -> int:
        """Tokens of all samples, with padding."""
        return self.text.input_ids.numel()

    def to(self, device: torch.device) -> Self:
        """The batch with its tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device, non_blocking=True) for name, value in values.items() if hasattr(value, "to")}
        return replace(self, **moved)


def collate_text(samples: Sequence[Sample], encoder: Encoder) -> dict[str, Any]:
    """The fields of a `MicroBatch`."""
    return {
        "keys": tuple(sample.key for sample in samples),
        "targets": tuple(sum(label != IGNORED for label in sample.example.labels) for sample in samples),
        "lengths": tuple(len(sample.example.input_ids) for sample in samples),
        "text": collate([sample.example for sample in samples], encoder.pad),
    }
