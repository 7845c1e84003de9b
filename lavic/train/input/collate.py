"""Samples and batches of both stages: prompts and targets, collated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lavic.model.inputs.label_mask import IGNORED, Batch, Example, collate
from lavic.model.inputs.prompt_encoder import Encoder


class Order(Protocol):
    """The order of an endless training set."""

    @property
    def window(self) -> int:
        """About how many samples, adjacent in the set, are shuffled together."""

    def at(self, position: int) -> int:
        """Index of the sample at a position over all epochs."""

    def span(self, first: int, last: int) -> np.ndarray:
        """Indices at the positions from `first` to `last - 1`: int64 [last - first]."""


class TextSample(Protocol):
    """The common attributes of the samples of both stages."""

    @property
    def key(self) -> str:
        """Its name in messages."""

    @property
    def example(self) -> Example:
        """Its tokenized prompt and target."""


@dataclass(frozen=True)
class TextBatch:
    """Prompts with their targets; each stage adds its photos or items."""

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


def collate_text(samples: Sequence[TextSample], encoder: Encoder) -> dict[str, Any]:
    """The fields of a `TextBatch`."""
    return {
        "keys": tuple(sample.key for sample in samples),
        "targets": tuple(sum(label != IGNORED for label in sample.example.labels) for sample in samples),
        "lengths": tuple(len(sample.example.input_ids) for sample in samples),
        "text": collate([sample.example for sample in samples], encoder.pad),
    }
