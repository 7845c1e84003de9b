"""The tokens that follow a candidate's title in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from lavic.model.item_store import ItemStore
from lavic.model.visual_tokens import project


class TokenSource(Protocol):
    """Tokens of items for prompts."""

    def count(self, item: str) -> int:
        """Tokens of an item."""
        ...

    def features(self, items: Sequence[str]) -> list[torch.Tensor]:
        """The tokens of distinct items in the language model's space, each [count, d_text]."""
        ...


class StoredTokens:
    """The item tokens of a store, projected.

    Args:
        model: A LlavaNext model, wrapped by PEFT or not.
        store: Holds the items.
        max_tokens: Number of tokens per item, the first ones; None: all.
    """

    def __init__(self, model: nn.Module, store: ItemStore, max_tokens: int | None = None) -> None:
        self.model, self.store, self.max_tokens = model, store, max_tokens

    def count(self, item: str) -> int:
        return self.store.count(item, self.max_tokens)

    def raw(self, items: Sequence[str]) -> torch.Tensor:
        """The tokens of items before the projector, one after the other, [tokens, d_vision]."""
        return self.store.tokens(items, self.max_tokens)

    def features(self, items: Sequence[str]) -> list[torch.Tensor]:
        device = next(self.model.parameters()).device
        projected = project(self.model, self.raw(items).to(device))
        return list(projected.split([self.count(item) for item in items]))
