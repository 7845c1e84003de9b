"""The two stages as modules with one face: a batch in, the loss of each target token out. Beside each, its data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers.models.llava_next.modeling_llava_next import unpad_image

from lavic.data.records import Conversation
from lavic.errors import DataError
from lavic.model.adapters import Kind
from lavic.model.compress import all_tokens, cls_tokens, project
from lavic.model.inputs import (
    IGNORED,
    Batch,
    Encoder,
    Example,
    collate,
    target_logits,
    target_tokens,
    token_losses,
)
from lavic.model.itemstore import ItemStore
from lavic.model.prompts import NONE, Candidate, describe
from lavic.model.views import Geometry, Grid
from lavic.train.teacher import divergence, teacher_logits


class Order(Protocol):
    """The order of an endless training set."""

    def at(self, position: int) -> int:
        """Index of the sample at a position over all epochs."""


@dataclass(frozen=True)
class TextBatch:
    """Prompts with their targets, and what every batch of ours can say about itself."""

    keys: tuple[str, ...]
    """What each sample is called in messages."""
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


# --- stage 1: distillation ------------------------------------------------------------------------


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

    def __init__(self, model: nn.Module, *, top_k: int = 0, weight: float = 0.5) -> None:
        """Describes it.

        Args:
            model: With a vision adapter.
            top_k: In training, also match the teacher's probabilities of so many tokens; 0: its words alone.
            weight: Share of that in the loss.
        """
        super().__init__()
        self.model = model
        self.top_k, self.weight = top_k, weight

    def forward(self, batch: PhotoBatch) -> torch.Tensor:
        """Negative log-likelihood of each target token, float32 [targets]; in training mixed with the divergence."""
        seen = batch.views
        counts = [1 + rows * columns for rows, columns in batch.grids]
        if list(batch.shown) != counts:
            seen = torch.cat([views[:n] for views, n in zip(seen.split(counts), batch.shown, strict=True)])
        logits = target_logits(self.model, batch.text, project(self.model, cls_tokens(self.model, seen)))
        losses = functional.cross_entropy(logits, target_tokens(batch.text), reduction="none")
        if not (self.training and self.top_k and batch.whole):
            return losses
        teacher = teacher_logits(self.model, batch.whole, batch.views, batch.sizes, batch.grids)
        return (1 - self.weight) * losses + self.weight * divergence(teacher, logits, self.top_k)


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

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, position: int) -> PhotoSample:
        photo = self.photos[self._index(position)]
        image = photo.image
        grid, shown, every = self._shape(position, image.size)
        example = self._example(photo.title, photo.text, shown if self.tokens == "cls" else every)
        whole = self._example(photo.title, photo.text, every) if self.teach else None
        views = torch.from_numpy(self.geometry.cut(image))
        return PhotoSample(photo.key, example, views, image.size, grid, shown, whole)

    def length(self, position: int) -> int:
        """Tokens of the sample at a position; its photo is not read."""
        meta, text = self.photos.words(self._index(position))
        _, shown, every = self._shape(position, (meta["width"], meta["height"]))
        tokens = every if self.teach or self.tokens == "all" else shown
        return len(self._example(meta["title"], text, tokens).input_ids)

    def _shape(self, position: int, size: tuple[int, int]) -> tuple[Grid, int, int]:
        """Tiles of a photo, views that the student sees, and patch tokens where somebody asks for them."""
        grid = self.geometry.grid(size)
        shown = 1 + grid[0] * grid[1]
        if self.nested:
            shown = min(shown, random.Random(f"{self.seed}/{position}").choice(self.nested))
        return grid, shown, count_tokens(self.geometry, size) if self.teach or self.tokens == "all" else 0

    def _index(self, position: int) -> int:
        return self.order.at(position) if self.order else position % len(self)

    def _example(self, title: str, text: str, tokens: int) -> Example:
        style = self.encoder.style
        try:
            return self.encoder.example(
                describe(title, tokens, style), text or None, max_length=self.max_length + tokens
            )
        except DataError:
            return self.encoder.example(describe("", tokens, style), None)

    def collate(self, samples: Sequence[PhotoSample]) -> PhotoBatch:
        """A batch of samples."""
        return PhotoBatch(
            **_text(samples, self.encoder),
            views=torch.cat([sample.views for sample in samples]),
            sizes=tuple(sample.size for sample in samples),
            grids=tuple(sample.grid for sample in samples),
            shown=tuple(sample.shown for sample in samples),
            whole=collate([s.whole for s in samples if s.whole], self.encoder.pad) if self.teach else None,
            whole_lengths=tuple(len(s.whole.input_ids) for s in samples if s.whole),
        )


# --- stage 2: recommendation tuning ---------------------------------------------------------------


@dataclass(frozen=True)
class ListSample:
    """A conversation with its list, and the ID to be learnt."""

    key: str
    example: Example
    items: torch.Tensor | None
    """Tokens of all candidates from the item store, [tokens, d_vision], in the list's order; None for titles only."""

    @property
    def length(self) -> int:
        return len(self.example.input_ids)


@dataclass(frozen=True)
class ListBatch(TextBatch):
    """Samples of `TuneData`."""

    items: torch.Tensor | None
    """Of all samples, [tokens, d_vision]"""

    def to(self, device: torch.device) -> ListBatch:
        items = None if self.items is None else self.items.to(device, non_blocking=True)
        return replace(self, text=self.text.to(device), items=items)


class TuneTask(nn.Module):
    """Stage 2: the ID of the right candidate, from ready item tokens; the vision tower is not there."""

    trains: Kind = "language"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ListBatch) -> torch.Tensor:
        """Negative log-likelihood of each target token, float32 [targets]."""
        photos = None if batch.items is None else project(self.model, batch.items)
        return token_losses(self.model, batch.text, photos)


class TuneData:
    """One sample for each target of each conversation.

    A sample's list has exactly one right answer: other targets of the conversation are left out, and a target that the
    list lacks takes the place of a candidate (the released training data has it in .2 to .7 of the rows; a test list is
    never touched). Where "none of these" is an answer, some lists lack the target on purpose. The choices are made from
    the seed and the position, on a copy.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        store: ItemStore,
        encoder: Encoder,
        *,
        candidates: str,
        max_length: int,
        tokens: Literal["items", "none"] = "items",
        tokens_per_item: Sequence[int] = (),
        none_share: float = 0.0,
        shuffle: bool = False,
        seed: int = 0,
        order: Order | None = None,
    ) -> None:
        """Describes the set.

        Args:
            conversations: With lists and targets.
            store: Titles and tokens of every candidate and target.
            encoder: Of the base model.
            candidates: Which list, a key of the source such as `candidates_st`.
            max_length: Longest prompt with its target, tokens; the conversation gives way.
            tokens: What stands behind a title: its item tokens, or nothing.
            tokens_per_item: Show the first so many tokens of each item, one of these numbers for each list; none: all.
            none_share: Share of the lists that lack the target, and are answered with "none of these"; above 0 every
                list offers that answer.
            shuffle: Show each list in a new order each time.
            seed: Of the choices.
            order: Of the samples, over all epochs; None reads them as they stand.

        Raises:
            DataError: A list is missing, or names an item that is not in the store.
        """
        self.conversations = conversations
        self.store = store
        self.encoder = encoder
        self.candidates = candidates
        self.max_length = max_length
        self.tokens = tokens
        self.tokens_per_item = tuple(tokens_per_item)
        self.none_share = none_share
        self.shuffle = shuffle
        self.seed = seed
        self.order = order
        self.overhead = 0
        self.pairs = [(row, target) for row, c in enumerate(conversations) for target in dict.fromkeys(c.targets)]
        for c in conversations:
            place = f"{c.file}:{c.row + 1}"
            if not c.candidates.get(candidates):
                raise DataError(f"{place}: no list {candidates!r}, only {', '.join(c.candidates) or 'none'}")
            for item in (*c.candidates[candidates], *c.targets):
                if item not in store:
                    raise DataError(
                        f"{place}: {item} is not in the item store {store.folder}: embed it, or drop the row"
                    )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> ListSample:
        row, target, listed, most = self._at(position)
        items = self.store.tokens(listed, most) if self.tokens == "items" else None
        return ListSample(f"{self.conversations[row].id}:{target}", self._example(row, target, listed, most), items)

    def length(self, position: int) -> int:
        """Tokens of the sample at a position; its items are not read."""
        return len(self._example(*self._at(position)).input_ids)

    def _at(self, position: int) -> tuple[int, str, list[str], int | None]:
        """A sample's conversation, right answer, list, and most tokens of an item."""
        row, target = self.pairs[self.order.at(position) if self.order else position % len(self)]
        choice = random.Random(f"{self.seed}/{position}")
        listed = self._list(self.conversations[row], target, choice)
        return row, target, listed, choice.choice(self.tokens_per_item) if self.tokens_per_item else None

    def _example(self, row: int, target: str, listed: Sequence[str], most: int | None) -> Example:
        return self.encoder.recommendation(
            self.conversations[row],
            [Candidate(item, self.store.title(item)) for item in listed],
            photo_tokens=[self.store.count(item, most) for item in listed] if self.tokens == "items" else 0,
            target=target if target in listed else NONE,
            max_length=self.max_length,
            none=self.none_share > 0,
        )

    def collate(self, samples: Sequence[ListSample]) -> ListBatch:
        """A batch of samples."""
        items = [sample.items for sample in samples if sample.items is not None]
        return ListBatch(**_text(samples, self.encoder), items=torch.cat(items) if items else None)

    def _list(self, conversation: Conversation, target: str, choice: random.Random) -> list[str]:
        others = set(conversation.targets) - {target}
        listed = [item for item in dict.fromkeys(conversation.candidates[self.candidates]) if item not in others]
        if self.none_share and choice.random() < self.none_share:
            listed = [item if item != target else self._stranger(conversation, choice) for item in listed]
        elif target not in listed:
            at = choice.randrange(max(1, len(listed)))
            listed[at : at + 1] = [target]  # in the place of a candidate, or alone where all were other targets
        if self.shuffle:
            choice.shuffle(listed)
        return listed

    def _stranger(self, conversation: Conversation, choice: random.Random) -> str:
        """An item that is neither listed nor right: a list without its target is as long as the others."""
        known = {*conversation.candidates[self.candidates], *conversation.targets}
        if len(known) >= len(self.store):
            raise DataError(f"{self.store.folder}: holds nothing besides the list of {conversation.id}")
        while (item := choice.choice(self.store.ids)) in known:
            pass
        return item


def _text(samples: Sequence[PhotoSample] | Sequence[ListSample], encoder: Encoder) -> dict[str, Any]:
    return {
        "keys": tuple(sample.key for sample in samples),
        "targets": tuple(sum(label != IGNORED for label in sample.example.labels) for sample in samples),
        "lengths": tuple(len(sample.example.input_ids) for sample in samples),
        "text": collate([sample.example for sample in samples], encoder.pad),
    }
