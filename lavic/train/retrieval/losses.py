"""The loss of the retriever: the other items of a batch are the negatives."""

from __future__ import annotations

import torch
from torch.nn import functional


def contrastive_loss(
    queries: torch.Tensor, items: torch.Tensor, scale: torch.Tensor, right: torch.Tensor, *, symmetric: bool
) -> torch.Tensor:
    """The mean loss of a batch of pairs (InfoNCE, van den Oord et al. 2018, arXiv 1807.03748).

    Args:
        queries: Unit vectors of the conversations, [b, dim].
        items: Unit vectors of their targets, [b, dim].
        scale: One over the temperature.
        right: bool [b, b]: whether item j is a right answer to conversation i. Beside the diagonal such an item is no
            negative: it is left out.
        symmetric: Also the loss of finding the conversation of each item.
    """
    labels = torch.arange(len(queries), device=queries.device)
    other_answers = right & ~torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    scores = (queries @ items.T * scale).masked_fill(other_answers, float("-inf"))
    loss = functional.cross_entropy(scores, labels)
    return (loss + functional.cross_entropy(scores.T, labels)) / 2 if symmetric else loss
