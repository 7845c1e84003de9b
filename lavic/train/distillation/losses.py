"""Stage 1 beyond the released method: the teacher's probabilities and its patches, besides its words."""

from __future__ import annotations

import torch
from torch import nn

from lavic.model.prompt_encoder import Batch, target_logits
from lavic.model.tiling import Grid
from lavic.model.visual_tokens import all_tokens, patch_tokens


@torch.no_grad()
def teacher_logits(
    model: nn.Module,
    text: Batch,
    views: torch.Tensor,
    sizes: tuple[tuple[int, int], ...],
    grids: tuple[Grid, ...],
) -> torch.Tensor:
    """What the untrained model predicts from every patch token, float32 [targets, vocabulary].

    Exact and without a file, at the price of a pass over some 2,900 tokens per photo.

    Args:
        model: The model in training; its adapter is left out.
        text: The prompts with a place for every patch token, and the same targets as the student's.
        views: Of all photos.
        sizes: Of the photos before cutting.
        grids: Of the photos.
    """
    with model.disable_adapter():  # type: ignore[operator]
        return target_logits(model, text, torch.cat(all_tokens(model, views, sizes, grids)))


def divergence(teacher: torch.Tensor, student: torch.Tensor, top_k: int) -> torch.Tensor:
    """Kullback-Leibler divergence of the student from the teacher over the teacher's likeliest tokens, [targets].

    The other tokens count as one more, so that the student cannot put its probability where nobody looks.

    Args:
        teacher: Logits, [targets, vocabulary].
        student: Logits, the same shape.
        top_k: Tokens that are told apart; of all of them it is the whole divergence.
    """
    theirs, places = teacher.log_softmax(-1).topk(min(top_k, teacher.shape[-1]))
    ours = student.log_softmax(-1).gather(-1, places)
    rest, own_rest = ((1 - logs.exp().sum(-1)).clamp(min=1e-7) for logs in (theirs, ours))
    return (theirs.exp() * (theirs - ours)).sum(-1) + rest * (rest / own_rest).log()


@torch.no_grad()
def patch_means(model: nn.Module, views: torch.Tensor) -> torch.Tensor:
    """The mean of the tokens that the untrained model makes of each view's patches.

    Args:
        model: The model in training; its adapter is left out.
        views: [views, 3, size, size]

    Returns:
        float32 [views, d_text]
    """
    with model.disable_adapter():  # type: ignore[operator]
        return patch_tokens(model, views).float().mean(1)


def distance(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The squared distance of each token from the teacher's, as a share of the teacher's own mean square, [views].

    Args:
        teacher: Tokens, [views, d_text].
        student: Tokens, the same shape.
    """
    return (student.float() - teacher).square().mean(-1) / teacher.square().mean(-1)
