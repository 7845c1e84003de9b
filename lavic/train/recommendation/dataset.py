"""The data of stage 2: a conversation with a list of candidates and the ID of the right one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch

from lavic.data.schema import Conversation
from lavic.errors import DataError
from lavic.model.inputs.label_mask import Example
from lavic.model.inputs.prompt_encoder import Encoder
from lavic.model.item_store import ItemStore
from lavic.model.prompts import NONE, Candidate
from lavic.train.input.collate import MicroBatch, Sample, collate_text
from lavic.train.input.shuffle_order import ShuffleOrder


@dataclass(frozen=True)
class TuneSample(Sample):
    """A conversation with its candidates, and the right ID as the target."""

    items: torch.Tensor | None
    """Tokens of all candidates from the item store, [tokens, d_vision], in the list's order; None for titles only."""


@dataclass(frozen=True)
class TuneBatch(MicroBatch):
    """A batch of `TuneDataset`."""

    items: torch.Tensor | None
    """Item tokens of all samples, [tokens, d_vision]"""


@dataclass(eq=False)
class TuneDataset:
    """One sample for each target of each conversation.

    A sample's list has exactly one right answer: other targets of the conversation are removed, and a target that the
    list lacks replaces a candidate (the released training data has it in .2 to .7 of the rows; test lists are never
    changed). With "none of these" as an answer, some lists lack the target on purpose. The choices depend on the seed
    and the position alone.

    Raises:
        DataError: A list is missing, or names an item that is not in the store.
    """

    conversations: Sequence[Conversation]
    """With lists and targets."""
    store: ItemStore
    """Titles and tokens of every candidate and target."""
    encoder: Encoder
    """Encoder of the base model."""
    _: KW_ONLY
    candidates: str
    """Which list, a key of the source such as `candidates_st`."""
    max_length: int
    """Maximum length of a prompt with its target, tokens; a longer conversation is shortened."""
    tokens: Literal["items", "none"] = "items"
    """What follows a title: its item tokens, or nothing."""
    tokens_per_item: Sequence[int] = ()
    """Show only the first n tokens of each item, n sampled from these for each list; empty: all."""
    none_share: float = 0.0
    """Share of the lists that lack the target, and are answered with "none of these"; above 0 every list offers that
    answer."""
    shuffle: bool = False
    """Show each list in a new order each time."""
    seed: int = 0
    """Seed of the choices."""
    order: ShuffleOrder | None = None
    """Order of the samples, over all epochs; None reads them in the file's order."""
    overhead: int = field(default=0, init=False)
    """See `TaskDataset.overhead`."""

    def __post_init__(self) -> None:
        self.pairs = [(row, target) for row, c in enumerate(self.conversations) for target in dict.fromkeys(c.targets)]
        for c in self.conversations:
            if not c.candidates.get(self.candidates):
                raise DataError(f"{c.place}: no list {self.candidates!r}, only {', '.join(c.candidates) or 'none'}")
            for item in (*c.candidates[self.candidates], *c.targets):
                if item not in self.store:
                    raise DataError(
                        f"{c.place}: {item} is not in the item store {self.store.folder}: embed it, or drop the row"
                    )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> TuneSample:
        row, target, candidates, max_tokens = self._draw(position)
        items = self.store.tokens(candidates, max_tokens) if self.tokens == "items" else None
        return TuneSample(self.key(position), self._example(row, target, candidates, max_tokens), items)

    def key(self, position: int) -> str:
        """See `TaskDataset.key`."""
        row, target = self._pair(position)
        return f"{self.conversations[row].id}:{target}"

    def lengths(self, positions: Sequence[int]) -> list[int]:
        """See `TaskDataset.lengths`; the item tokens are not read."""
        return [len(self._example(*self._draw(position)).input_ids) for position in positions]

    def _pair(self, position: int) -> tuple[int, str]:
        """Row and target of a sample."""
        return self.pairs[self.order.at(position) if self.order else position % len(self)]

    def _draw(self, position: int) -> tuple[int, str, list[str], int | None]:
        """Row, target, candidates and most tokens of an item, of a sample."""
        row, target = self._pair(position)
        rng = random.Random(f"{self.seed}/{position}")
        candidates = self._list(self.conversations[row], target, rng)
        return row, target, candidates, rng.choice(self.tokens_per_item) if self.tokens_per_item else None

    def _example(self, row: int, target: str, candidates: Sequence[str], max_tokens: int | None) -> Example:
        return self.encoder.recommendation(
            self.conversations[row],
            [Candidate(item, self.store.title(item)) for item in candidates],
            photo_tokens=[self.store.count(item, max_tokens) for item in candidates] if self.tokens == "items" else 0,
            target=target if target in candidates else NONE,
            max_length=self.max_length,
            none=self.none_share > 0,
        )

    def collate(self, samples: Sequence[TuneSample]) -> TuneBatch:
        """A batch of samples."""
        items = [sample.items for sample in samples if sample.items is not None]
        return TuneBatch(**collate_text(samples, self.encoder), items=torch.cat(items) if items else None)

    def _list(self, conversation: Conversation, target: str, rng: random.Random) -> list[str]:
        other_targets = set(conversation.targets) - {target}
        candidates = [
            item for item in dict.fromkeys(conversation.candidates[self.candidates]) if item not in other_targets
        ]
        if self.none_share and rng.random() < self.none_share:
            candidates = [item if item != target else self._draw_unlisted(conversation, rng) for item in candidates]
        elif target not in candidates:
            index = rng.randrange(max(1, len(candidates)))
            candidates[index : index + 1] = [target]  # replaces a candidate; alone where all were other targets
        if self.shuffle:
            rng.shuffle(candidates)
        return candidates

    def _draw_unlisted(self, conversation: Conversation, rng: random.Random) -> str:
        """An item that is neither listed nor a target: it keeps a list without its target as long as the others."""
        known = {*conversation.candidates[self.candidates], *conversation.targets}
        if len(known) >= len(self.store):
            raise DataError(f"{self.store.folder}: has no item besides the candidates of {conversation.id}")
        while (item := rng.choice(self.store.ids)) in known:
            pass
        return item
