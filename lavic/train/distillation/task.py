"""Stage 1, distillation: a batch of photos in, the loss of each token of their descriptions out; and its data."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers.models.llava_next.modeling_llava_next import unpad_image

from lavic.errors import DataError
from lavic.model.config import Kind
from lavic.model.prompt_encoder import (
    Batch,
    Encoder,
    Example,
    collate,
    target_logits,
    target_tokens,
    token_losses,
)
from lavic.model.tiling import Geometry, Grid
from lavic.model.visual_tokens import all_tokens, cls_tokens, project
from lavic.train.distillation.losses import distance, divergence, patch_means, teacher_logits
from lavic.train.input.collate import Order, TextBatch, gather
from lavic.train.input.length_table import LengthTable

_WINDOW = 4096
"""Photos that are looked ahead in a set that is read as it stands."""

_WINDOW = 4096
"""Photos that are looked ahead in a set that is read as it stands."""


@dataclass(frozen=True)
class PhotoSample:
    """A photo, cut into views, and the description to be learnt."""

    key: str
    example: Example
    views: torch.Tensor
    """float32 [views, 3, size, size]"""
    size: tuple[int, int]
    """Width and height of the photo before cutting."""
    grid: Grid
    """Rows and columns of its tiles."""
    shown: int
    """How many of the views the student sees, the first ones."""
    whole: Example | None = None
    """The same with a place for every patch token, for the teacher."""

    @property
    def length(self) -> int:
        return len((self.whole or self.example).input_ids)


@dataclass(frozen=True)
class PhotoBatch(TextBatch):
    """Samples of `DistillData`."""

    views: torch.Tensor
    """Of all photos, float32 [views, 3, size, size]"""
    sizes: tuple[tuple[int, int], ...]
    grids: tuple[Grid, ...]
    shown: tuple[int, ...]
    """How many of each photo's views the student sees."""
    whole: Batch | None = None
    """For the teacher."""
    whole_lengths: tuple[int, ...] = ()
    """Tokens of each of the teacher's prompts."""

    def to(self, device: torch.device) -> PhotoBatch:
        whole = None if self.whole is None else self.whole.to(device)
        return replace(self, text=self.text.to(device), views=self.views.to(device, non_blocking=True), whole=whole)


class DistillTask(nn.Module):
    """Stage 1, the student: the description from one token of each view, gradients into vision tower and projector."""

    trains: Kind = "vision"

    def __init__(self, model: nn.Module, *, top_k: int = 0, weight: float = 0.5, patches: float = 0.0) -> None:
        """Describes it.

        Args:
            model: With a vision adapter.
            top_k: In training, also match the teacher's probabilities of so many tokens; 0: its words alone.
            weight: Share of that in the loss.
            patches: In training, weight of each photo's distance from the teacher's patches, added to its losses.
        """
        super().__init__()
        self.model = model
        self.top_k, self.weight, self.patches = top_k, weight, patches

    def forward(self, batch: PhotoBatch) -> torch.Tensor:
        """Negative log-likelihood of each target token, float32 [targets]; in training with what `__init__` adds."""
        seen = batch.views
        counts = [1 + rows * columns for rows, columns in batch.grids]
        if list(batch.shown) != counts:
            seen = torch.cat([views[:n] for views, n in zip(seen.split(counts), batch.shown, strict=True)])
        tokens = project(self.model, cls_tokens(self.model, seen))
        logits = target_logits(self.model, batch.text, tokens)
        losses = functional.cross_entropy(logits, target_tokens(batch.text), reduction="none")
        if not self.training:
            return losses
        if self.top_k and batch.whole:
            teacher = teacher_logits(self.model, batch.whole, batch.views, batch.sizes, batch.grids)
            losses = (1 - self.weight) * losses + self.weight * divergence(teacher, logits, self.top_k)
        if self.patches:
            apart = distance(patch_means(self.model, seen), tokens).split(batch.shown)
            of_photos = torch.stack([views.mean() for views in apart])
            targets = torch.tensor(batch.targets, device=losses.device)
            losses = losses + self.patches * of_photos.repeat_interleave(targets)
        return losses


class TeacherTask(nn.Module):
    """The description from every patch token: what stage 1 is measured against. Not trained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PhotoBatch) -> torch.Tensor:
        """Negative log-likelihood of each target token, float32 [targets]."""
        photos = all_tokens(self.model, batch.views, batch.sizes, batch.grids)
        return token_losses(self.model, batch.text, torch.cat(photos))


def count_tokens(geometry: Geometry, size: tuple[int, int]) -> int:
    """How many patch tokens `all_tokens` gives for a photo of (width, height) `size`."""
    side = geometry.size // geometry.patch
    width, height = size
    rows, columns = geometry.grid(size)
    grid = unpad_image(torch.empty(1, rows * side, columns * side, device="meta"), (height, width))
    return side**2 + grid.shape[1] * (grid.shape[2] + 1)


class DistillData:
    """Described photos of a set of shards.

    A photo without a description, or one too long for `max_length`, has no target tokens: it weighs nothing, and the
    loop counts it as skipped.
    """

    def __init__(
        self,
        photos: Any,
        geometry: Geometry,
        encoder: Encoder,
        *,
        max_length: int,
        tokens: Literal["cls", "all"] = "cls",
        teach: bool = False,
        nested: Sequence[int] = (),
        seed: int = 0,
        order: Order | None = None,
        table: Path | None = None,
    ) -> None:
        """Describes the set.

        Args:
            photos: A `ShardDataset`: by index, samples with `key`, `title`, `text` and `image`.
            geometry: How the base model wants its photos.
            encoder: Of the base model.
            max_length: Longest title and description with the words around them, tokens; the photo's are not counted.
            tokens: What stands for the photo: the [CLS] of each view, or every patch token (for `TeacherTask`).
            teach: Encode every prompt a second time, for the teacher's probabilities.
            nested: Show each photo by so many of its views, the first ones, one of these numbers at a time; none: all.
            seed: Of that choice.
            order: Of the samples, over all epochs; None reads them as they stand.
            table: File in which this machine's ranks keep the lengths of samples, see `LengthTable`; its name says of
                which set they are, and what counted them. None: each rank counts them when it needs them.
        """
        self.photos = photos
        self.geometry = geometry
        self.encoder = encoder
        self.max_length = max_length
        self.tokens = tokens
        self.teach = teach
        self.nested = tuple(nested)
        self.seed = seed
        self.order = order
        self.overhead = 0
        """A photo's way through the vision tower, in tokens of the language model."""
        self._table = None if table is None else LengthTable(table, len(photos), self._measure_all)
        self._looked = range(0)
        self._order_ahead = copy.copy(order)  # an order keeps the window that it was asked for last

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, position: int) -> PhotoSample:
        self._look_ahead(position)
        photo = self.photos[self._index(position)]
        image = photo.image
        grid, shown, every = self._shape(position, image.size)
        example = self._example(photo.title, photo.text, shown if self.tokens == "cls" else every)
        whole = self._example(photo.title, photo.text, every) if self.teach else None
        views = torch.from_numpy(self.geometry.cut(image))
        return PhotoSample(photo.key, example, views, image.size, grid, shown, whole)

    def key(self, position: int) -> str:
        """The key of the photo at a position; the photo is not read."""
        meta, _ = self.photos.words(self._index(position))
        return str(meta["key"])

    def lengths(self, positions: Sequence[int]) -> list[int]:
        """Tokens of the samples at some positions; their photos are not read."""
        indices = [self._index(position) for position in positions]
        rows = self._table(np.array(indices, np.int64)).tolist() if self._table else map(self._measure, indices)
        found = []
        for position, (words, width, height) in zip(positions, rows, strict=True):
            _, shown, every = self._shape(position, (width, height))
            found.append(words + (every if self.teach or self.tokens == "all" else shown))
        return found

    def _measure(self, index: int) -> tuple[int, int, int]:
        """Tokens of a sample besides its photo's, width and height of the photo."""
        meta, text = self.photos.words(index)
        return len(self._example(meta["title"], text, 1).input_ids) - 1, meta["width"], meta["height"]

    def _measure_all(self, indices: range) -> list[tuple[int, int, int]]:
        return [self._measure(index) for index in indices]

    def no_targets(self) -> str:
        """Why no photo has a target, for the error that says so: reads the words of every photo."""
        lengths = []
        for position in range(len(self)):
            meta, text = self.photos.words(self._index(position))
            if text:
                prompt = self.encoder.describe(meta["title"], 0)
                lengths.append(len(self.encoder.example(prompt, text).input_ids))
        if not lengths:
            return f"none of the {len(self):,} photos is described: run `lavic describe` on the set"
        return (
            f"{len(lengths):,} of {len(self):,} photos are described, and the shortest title and description take "
            f"{min(lengths)} tokens, more than --max-length {self.max_length}: raise it"
        )

    def _shape(self, position: int, size: tuple[int, int]) -> tuple[Grid, int, int]:
        """Tiles of a photo, views that the student sees, and patch tokens where somebody asks for them."""
        grid = self.geometry.grid(size)
        shown = 1 + grid[0] * grid[1]
        if self.nested:
            shown = min(shown, random.Random(f"{self.seed}/{position}").choice(self.nested))
        return grid, shown, count_tokens(self.geometry, size) if self.teach or self.tokens == "all" else 0

    def _index(self, position: int) -> int:
        return self.order.at(position) if self.order else position % len(self)

    def _look_ahead(self, position: int) -> None:
        """Has the shards of this window of the order and the next one downloaded, where they are in an object store."""
        if not self.photos.is_remote or position in self._looked:
            return
        window = self.order.window if self.order else _WINDOW
        last = position + 2 * window
        if self._order_ahead:
            indices = self._order_ahead.span(position, last)
        else:
            indices = np.arange(position, last) % len(self)
        self.photos.read_ahead(indices)
        self._looked = range(position, position + -(-window // 4))

    def _example(self, title: str, text: str, tokens: int) -> Example:
        encoder = self.encoder
        try:
            return encoder.example(encoder.describe(title, tokens), text or None, max_length=self.max_length + tokens)
        except DataError:
            return encoder.example(encoder.describe("", tokens), None)

    def collate(self, samples: Sequence[PhotoSample]) -> PhotoBatch:
        """A batch of samples."""
        return PhotoBatch(
            **gather(samples, self.encoder),
            views=torch.cat([sample.views for sample in samples]),
            sizes=tuple(sample.size for sample in samples),
            grids=tuple(sample.grid for sample in samples),
            shown=tuple(sample.shown for sample in samples),
            whole=collate([s.whole for s in samples if s.whole], self.encoder.pad) if self.teach else None,
            whole_lengths=tuple(len(s.whole.input_ids) for s in samples if s.whole),
        )
