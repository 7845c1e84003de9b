"""The data of stage 1: described photos, cut into views, with the prompts of student and teacher."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lavic.errors import DataError
from lavic.model.inputs.label_mask import Batch, Example, collate
from lavic.model.inputs.prompt_encoder import Encoder
from lavic.model.tiling import Geometry, Grid
from lavic.model.visual_tokens import count_patch_tokens
from lavic.train.input.collate import MicroBatch, Sample, collate_text
from lavic.train.input.length_table import LengthTable
from lavic.train.input.shuffle_order import ShuffleOrder

_READ_AHEAD = 4096
"""Photos that are downloaded ahead in a remote set that is read in its own order."""


@dataclass(frozen=True)
class PhotoSample(Sample):
    """A photo, cut into views, with its description as the target."""

    views: torch.Tensor
    """float32 [views, 3, size, size]"""
    size: tuple[int, int]
    """Width and height of the photo before cutting."""
    grid: Grid
    """Rows and columns of its tiles."""
    views_shown: int
    """Views that the student sees, the first ones."""
    teacher_example: Example | None = None
    """The same with a placeholder for every patch token, for the teacher."""

    @property
    def length(self) -> int:
        return len((self.teacher_example or self.example).input_ids)


@dataclass(frozen=True)
class PhotoBatch(MicroBatch):
    """A batch of `DistillDataset`."""

    views: torch.Tensor
    """The views of all photos, float32 [views, 3, size, size]"""
    sizes: tuple[tuple[int, int], ...]
    grids: tuple[Grid, ...]
    views_shown: tuple[int, ...]
    """Views of each photo that the student sees."""
    teacher_text: Batch | None = None
    """The teacher's prompts and targets."""
    teacher_lengths: tuple[int, ...] = ()
    """Tokens of each of the teacher's prompts."""


@dataclass(eq=False)
class DistillDataset:
    """Described photos of a set of shards.

    A photo without a description, or with one too long for `max_length`, has no target tokens: it does not count in
    the loss, and the trainer counts it as skipped.
    """

    photos: Any
    """A `ShardDataset`: by index, samples with `key`, `title`, `text` and `image`."""
    geometry: Geometry
    """How the base model's photos are cut into views."""
    encoder: Encoder
    """Encoder of the base model."""
    _: KW_ONLY
    max_length: int
    """Maximum length of prompt and description, tokens, without the photo's."""
    tokens: Literal["cls", "all"] = "cls"
    """What stands for the photo: the [CLS] of each view, or every patch token (for `TeacherTask`)."""
    teach: bool = False
    """Encode every prompt a second time, for the teacher."""
    nested: Sequence[int] = ()
    """Show only the first n views of each photo, n sampled from these; empty: all."""
    seed: int = 0
    """Seed of that choice."""
    order: ShuffleOrder | None = None
    """Order of the samples, over all epochs; None reads them in the set's order."""
    table: InitVar[Path | None] = None
    """File in which this machine's ranks keep the lengths of samples, see `LengthTable`; its name identifies the set
    and the tokenization. None: each rank counts tokens when it needs them."""
    overhead: int = 0
    """Cost of a photo in the vision tower, in tokens of the language model."""

    def __post_init__(self, table: Path | None) -> None:
        self._table = None if table is None else LengthTable(table, len(self.photos), self._measure_all)
        self._ahead = range(0)
        self._ahead_order = copy.copy(self.order)  # an order keeps the window that it was asked for last

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, position: int) -> PhotoSample:
        self._read_ahead(position)
        photo = self.photos[self._index(position)]
        image = photo.image
        grid, num_views, patch_tokens = self._layout(position, image.size)
        example = self._example(photo.title, photo.text, num_views if self.tokens == "cls" else patch_tokens)
        teacher = self._example(photo.title, photo.text, patch_tokens) if self.teach else None
        views = torch.from_numpy(self.geometry.cut(image))
        return PhotoSample(photo.key, example, views, image.size, grid, num_views, teacher)

    def key(self, position: int) -> str:
        """See `TaskDataset.key`; the shard is not read."""
        return str(self.photos.key(self._index(position)))

    def lengths(self, positions: Sequence[int]) -> list[int]:
        """See `TaskDataset.lengths`; the photos are not read."""
        indices = [self._index(position) for position in positions]
        rows = self._table(np.array(indices, np.int64)).tolist() if self._table else map(self._measure, indices)
        lengths = []
        for position, (text_tokens, width, height) in zip(positions, rows, strict=True):
            _, num_views, patch_tokens = self._layout(position, (width, height))
            lengths.append(text_tokens + (patch_tokens if self.teach or self.tokens == "all" else num_views))
        return lengths

    def _measure(self, index: int) -> tuple[int, int, int]:
        """Tokens of a sample without its photo's, width and height of the photo."""
        meta, text = self.photos.meta_and_text(index)
        return len(self._example(meta["title"], text, 1).input_ids) - 1, meta["width"], meta["height"]

    def _measure_all(self, indices: range) -> list[tuple[int, int, int]]:
        return [self._measure(index) for index in indices]

    def no_targets(self) -> str:
        """Why no photo has a target, for an error message; reads the text of every photo."""
        lengths = []
        for position in range(len(self)):
            meta, text = self.photos.meta_and_text(self._index(position))
            if text:
                prompt = self.encoder.describe(meta["title"], 0)
                lengths.append(len(self.encoder.example(prompt, text).input_ids))
        if not lengths:
            return f"none of the {len(self):,} photos is described: run `lavic describe` on the set"
        return (
            f"{len(lengths):,} of {len(self):,} photos are described, and the shortest title and description take "
            f"{min(lengths)} tokens, more than --max-length {self.max_length}: raise it"
        )

    def _layout(self, position: int, size: tuple[int, int]) -> tuple[Grid, int, int]:
        """A photo's grid, the number of views that the student sees, and that of patch tokens (0 where not needed)."""
        grid = self.geometry.grid(size)
        num_views = 1 + grid[0] * grid[1]
        if self.nested:
            num_views = min(num_views, random.Random(f"{self.seed}/{position}").choice(self.nested))
        return grid, num_views, count_patch_tokens(self.geometry, size) if self.teach or self.tokens == "all" else 0

    def _index(self, position: int) -> int:
        return self.order.at(position) if self.order else position % len(self)

    def _read_ahead(self, position: int) -> None:
        """Downloads the shards of this window of the order and the next one, where they are in an object store."""
        if not self.photos.is_remote or position in self._ahead:
            return
        window = self.order.window if self.order else _READ_AHEAD
        last = position + 2 * window
        if self._ahead_order:
            indices = self._ahead_order.span(position, last)
        else:
            indices = np.arange(position, last) % len(self)
        self.photos.read_ahead(indices)
        self._ahead = range(position, position + -(-window // 4))

    def _example(self, title: str, text: str, tokens: int) -> Example:
        encoder = self.encoder
        try:
            return encoder.example(encoder.describe(title, tokens), text or None, max_length=self.max_length + tokens)
        except DataError:
            return encoder.example(encoder.describe("", tokens), None)

    def collate(self, samples: Sequence[PhotoSample]) -> PhotoBatch:
        """A batch of samples."""
        teacher = [sample.teacher_example for sample in samples if sample.teacher_example]
        return PhotoBatch(
            **collate_text(samples, self.encoder),
            views=torch.cat([sample.views for sample in samples]),
            sizes=tuple(sample.size for sample in samples),
            grids=tuple(sample.grid for sample in samples),
            views_shown=tuple(sample.views_shown for sample in samples),
            teacher_text=collate(teacher, self.encoder.pad) if teacher else None,
            teacher_lengths=tuple(len(example.input_ids) for example in teacher),
        )
