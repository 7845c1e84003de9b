"""Fusion of the lists of several methods by reciprocal rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lavic.errors import ConfigError
from lavic.recommend.retrieval.hits import Hits

RANK_CONSTANT = 60
"""Constant of reciprocal rank fusion, as in its paper: Cormack, Clarke, Buettcher, SIGIR 2009."""


def method_weights(methods: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """The settings `methods` and `weights` of a command, for `fuse`.

    Raises:
        ConfigError: There are weights, but not one for each method.
    """
    if weights and len(weights) != len(methods):
        named = f"{len(methods)} methods" if methods else "no --methods"
        raise ConfigError(f"--weights: {len(weights)} for {named}: give one for each, in their order")
    if invalid := [weight for weight in weights if not weight > 0]:
        raise ConfigError(f"--weights: {invalid[0]:g} is not above 0")
    return dict(zip(methods, weights, strict=False))


def fuse(
    lists: Mapping[str, Hits], k: int, *, constant: int = RANK_CONSTANT, weights: Mapping[str, float] | None = None
) -> Hits:
    """Fuses lists by reciprocal rank: an item's score is the sum of 1 / (constant + rank) over the lists that have it.

    Ranks start at 1; a list without the item adds nothing. Sums are exact, so the order of the lists does not matter.

    Args:
        lists: Hits by method.
        k: Length of the fused list, at most.
        constant: Added to every rank.
        weights: By method: what its share of the sum is multiplied by, 1 where nothing is said.
    """
    shares: dict[str, list[float]] = {}
    for method, hits in lists.items():
        weight = (weights or {}).get(method, 1.0)
        for rank, id in enumerate(dict.fromkeys(hits.ids), 1):
            shares.setdefault(id, []).append(weight / (constant + rank))
    ranked = sorted(((-math.fsum(parts), id) for id, parts in shares.items()))[:k]
    return Hits([id for _, id in ranked], [-score for score, _ in ranked])
