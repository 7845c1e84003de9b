"""Controls: item tokens without information about their item.

Both are made of the tokens of a test set's candidates, so that they lie where the model's own inputs lie: a model that
scores as high with them does not look at the photos.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from lavic.model.item_store import ItemStore
from lavic.recommend.ranking.token_source import StoredTokens

CHUNK = 4096
"""Items that are read together."""


class BlankTokens(StoredTokens):
    """Every item has the same tokens: the mean of all candidates', view by view."""

    def __init__(self, model: nn.Module, store: ItemStore, max_tokens: int | None, items: Sequence[str]) -> None:
        """Reads the tokens of `items`, the distinct candidates of a test set, once."""
        super().__init__(model, store, max_tokens)
        self.mean, self.deviation = _moments(store, items)

    def raw(self, items: Sequence[str]) -> torch.Tensor:
        return torch.cat([self.mean[: self.count(item)] for item in items])


class NoiseTokens(BlankTokens):
    """Every item has random tokens: normal, with the mean and deviation of all candidates' in each dimension.

    An item's tokens depend on the seed and its id alone.
    """

    def __init__(
        self, model: nn.Module, store: ItemStore, max_tokens: int | None, items: Sequence[str], seed: int
    ) -> None:
        super().__init__(model, store, max_tokens, items)
        self.seed = seed

    def raw(self, items: Sequence[str]) -> torch.Tensor:
        return torch.cat([self._draw(item) for item in items])

    def _draw(self, item: str) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self.seed}\0{item}".encode(errors="surrogatepass"), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        count = self.count(item)
        noise = torch.randn(self.mean[:count].shape, generator=generator)
        return self.mean[:count] + self.deviation[:count] * noise


def _moments(store: ItemStore, items: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of items' tokens, [views, d_vision] float32 each; of each view over its items."""
    total = squares = count = torch.zeros((), dtype=torch.float64)
    for first in range(0, len(items), CHUNK):
        chunk = items[first : first + CHUNK]
        tokens = store.lookup(chunk).double()  # [n, views, d_vision], zeros where an item has fewer views
        views = torch.tensor([store.count(item) for item in chunk])
        present = (torch.arange(tokens.shape[1])[None] < views[:, None]).double()
        total = total + tokens.sum(0)
        squares = squares + tokens.square().sum(0)
        count = count + present.sum(0)[:, None]
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    return mean.float(), variance.sqrt().float()
