"""The GPU benchmark's training samples: what a position holds is a function of the position, as is its length."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gpu_photos import SIDE

from lavic.model.inputs.label_mask import IGNORED, Example, collate
from lavic.model.tiling import VIEWS
from lavic.train.distillation.dataset import PhotoBatch, PhotoSample
from lavic.train.recommendation.dataset import TuneBatch, TuneSample

ITEMS = 20_000
"""In the store that stage 2 reads."""


class Drawn:
    """Texts: lengths fall off exponentially from the shortest, half of them are below the middle."""

    overhead = 0

    def __init__(self, config: Any, *, shortest: int, middle: int, longest: int, candidates: int, targets: int) -> None:
        self.config = config
        self.bounds = (shortest, middle, longest)
        self.candidates, self.targets = candidates, targets

    def __len__(self) -> int:
        return 1_000_000

    def length(self, position: int) -> int:
        shortest, middle, longest = self.bounds
        tail = random.Random(position).expovariate(math.log(2) / (middle - shortest))
        return min(longest, shortest + round(tail))

    def lengths(self, positions: Sequence[int]) -> list[int]:
        return [self.length(position) for position in positions]

    def example(self, position: int) -> Example:
        """Words, the photos' places early in the prompt, the target at its end."""
        rng, length = np.random.default_rng(position), self.length(position)
        ids = rng.integers(10, min(30_000, self.config.text_config.vocab_size), length)
        places = np.arange(VIEWS * self.candidates)
        ids[1 + places + places // VIEWS * 4] = self.config.image_token_id
        labels = np.full(length, IGNORED)
        labels[-self.targets :] = ids[-self.targets :]
        return Example(ids.tolist(), labels.tolist())

    def named(self, samples: Sequence[Any]) -> dict[str, Any]:
        return {
            "keys": tuple(sample.key for sample in samples),
            "targets": (self.targets,) * len(samples),
            "lengths": tuple(sample.length for sample in samples),
            "text": collate([sample.example for sample in samples], 0),
        }


class Lists(Drawn):
    """Stage 2: item tokens come out of a store as large as a catalogue."""

    def __init__(self, config: Any, jpgs: Sequence[object], **how: int) -> None:
        super().__init__(config, candidates=10, targets=10, **how)
        self.jpgs = jpgs
        self.store = torch.randn(ITEMS, VIEWS, config.vision_config.hidden_size, dtype=torch.float32).half()

    def listed(self, position: int) -> list[int]:
        return random.Random(~position).sample(range(ITEMS), self.candidates)

    def __getitem__(self, position: int) -> TuneSample:
        items = torch.cat([self.store[item] for item in self.listed(position)])
        return TuneSample(str(position), self.example(position), items)

    def collate(self, samples: Sequence[TuneSample]) -> TuneBatch:
        return TuneBatch(**self.named(samples), items=torch.cat([s.items for s in samples if s.items is not None]))

    def photos(self, position: int) -> list[object]:
        return [self.jpgs[item % len(self.jpgs)] for item in self.listed(position)]


class Photos(Drawn):
    """Stage 1: photos are decoded and cut."""

    def __init__(self, config: Any, jpgs: Sequence[object], cut: Callable[[object], torch.Tensor], **how: int) -> None:
        super().__init__(config, candidates=1, **how)
        self.jpgs, self.cut = jpgs, cut

    def __getitem__(self, position: int) -> PhotoSample:
        (jpg,) = self.photos(position)
        return PhotoSample(str(position), self.example(position), self.cut(jpg), (SIDE, SIDE), (2, 2), VIEWS)

    def collate(self, samples: Sequence[PhotoSample]) -> PhotoBatch:
        count = len(samples)
        shapes = {"sizes": ((SIDE, SIDE),) * count, "grids": ((2, 2),) * count, "views_shown": (VIEWS,) * count}
        return PhotoBatch(**self.named(samples), views=torch.cat([sample.views for sample in samples]), **shapes)

    def photos(self, position: int) -> list[object]:
        return [self.jpgs[position % len(self.jpgs)]]
