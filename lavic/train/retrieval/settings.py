"""Settings of the retriever's head and its training."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lavic.config import Seed, settings


@settings
class HeadSettings:
    """The projection of each tower, and how it is trained."""

    dim: PositiveInt = 256
    """Width of the vectors."""
    hidden: NonNegativeInt = 512
    """Width of each projection's hidden layer; 0 makes it linear."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Dropout on the features and the hidden layer, in training."""
    folds: Annotated[int, Field(ge=0, le=64)] = 5
    """Further heads, each trained without one fold of the conversations: lists for training conversations are made by
    the head that has not seen them. At least 2; 0 trains none, and the lists of training conversations are
    optimistically biased."""
    epochs: PositiveFloat = 20.0
    """Passes over the training pairs."""
    batch_size: Annotated[int, Field(ge=2)] = 512
    """Pairs of one step; the other pairs' items are the negatives."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW; cosine decay to zero."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps with linear warm-up."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of AdamW."""
    temperature: PositiveFloat = 0.05
    """Initial temperature, which divides the inner products in the loss and is learnt."""
    symmetric: bool = True
    """Also learn to find the conversation of an item; without it only the item of a conversation."""
    seed: Seed = 0
    """Seed of weights, order and dropout."""

    def total_steps(self, pairs: int) -> int:
        """Steps of a training on a number of pairs."""
        return max(1, math.ceil(self.epochs * pairs / self.batch_size))

    def learning_rate(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 1."""
        warmup = math.ceil(self.warmup * total)
        if step <= warmup:
            return self.lr * step / warmup
        return self.lr * (1 + math.cos(math.pi * (step - warmup - 1) / max(1, total - warmup))) / 2
