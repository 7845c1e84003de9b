"""All image tokens of a photo, by the vision tower, as the base model was trained to read it.

A photo costs up to thousands of tokens (2,928 of LLaVA-v1.6), so a list may not fit into one prompt. It is then ranked
in groups, whose winners meet in further groups (`lavic.recommend.ranking.tournament`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from lavic.errors import ConfigError, DataError
from lavic.model.bundle import Bundle
from lavic.model.loading import Backbone
from lavic.model.visual_tokens import all_tokens, count_patch_tokens, most_patch_tokens
from lavic.recommend.ranking.ranked_list import RankedList
from lavic.recommend.ranking.ranker import Ranker
from lavic.recommend.ranking.request import Request
from lavic.recommend.ranking.tournament import Tournament

RULE = (
    "A prompt's text may be as long as the bundle's longest prompt; the rest of the context holds photos. If more "
    "candidates are in a list than fit, they are assigned round-robin to groups; the top items of each group, as many "
    "as fit, are re-ranked in a final group, and eliminated items keep their odds relative to their group's winners."
)
"""How a list becomes groups."""


@dataclass(frozen=True, kw_only=True)
class GroupSize:
    """How many candidates fit into a prompt with all image tokens."""

    context: int
    """Maximum length of a prompt, tokens."""
    text: int
    """Tokens of these for conversation, titles and the words around them."""
    photo: int
    """Maximum number of tokens of a photo."""
    size: int
    """Candidates of a group."""
    rule: str = RULE

    @classmethod
    def of(cls, bundle: Bundle, context: int | None) -> GroupSize:
        """The size for a bundle's base model.

        Args:
            bundle: Says how long a prompt's text may be.
            context: Longest prompt; None: the base model's context.

        Raises:
            ConfigError: Fewer than two photos fit.
        """
        config: Any = bundle.backbone.model.config.text_config
        longest = int(config.max_position_embeddings)
        context, text = min(context or longest, longest), bundle.info.max_length
        photo = most_patch_tokens(bundle.backbone.geometry)
        size = (context - text) // photo
        if size < 2:
            raise ConfigError(
                f"--arms base_photos: of a context of {context:,} tokens {max(0, context - text):,} are left for "
                f"photos of up to {photo:,} tokens each, and a group needs two: raise --photo-context (the model's "
                f"context is {longest:,})"
            )
        return cls(context=context, text=text, photo=photo, size=size)


class PhotoTokens:
    """All image tokens of items, made when they are asked for; a `TokenSource`.

    Args:
        backbone: The base model, with its vision tower.
        photo: Item -> its encoded photo, or None.
    """

    def __init__(self, backbone: Backbone, photo: Callable[[str], bytes | None]) -> None:
        self.backbone, self._photo = backbone, photo
        self._sizes: dict[str, tuple[int, int]] = {}

    def count(self, item: str) -> int:
        if item not in self._sizes:
            self._sizes[item] = self._open(item).size
        return count_patch_tokens(self.backbone.geometry, self._sizes[item])

    def features(self, items: Sequence[str]) -> list[torch.Tensor]:
        features = []
        for item in items:
            photo, geometry = self._open(item), self.backbone.geometry
            views = torch.from_numpy(geometry.cut(photo)).to(self.backbone.device)
            with torch.no_grad():
                features += all_tokens(self.backbone.model, views, [photo.size], [geometry.grid(photo.size)])
        return features

    def _open(self, item: str) -> Image.Image:
        data = self._photo(item)
        if data is None:
            raise DataError(
                f"{item}: no photo of it is in --shards, and --arms base_photos shows one of each candidate"
            )
        return Image.open(io.BytesIO(data))


def rank_in_groups(
    ranker: Ranker, requests: Sequence[Request], size: int, progress: Callable[[int], None]
) -> list[RankedList]:
    """Ranks lists in groups of at most `size` candidates; one that fits is ranked whole.

    Args:
        progress: Called with the number of requests done since the last call.
    """
    rankings = []
    for request in requests:
        tournament = Tournament(tuple(dict.fromkeys(request.candidates)), size)
        while tournament.groups:
            groups = [
                Request(conversation=request.conversation, candidates=group, tokens_of=request.tokens_of)
                for group in tournament.groups
            ]
            tournament.advance(ranker.rank(groups))
        rankings.append(tournament.ranking)
        progress(1)
    return rankings
