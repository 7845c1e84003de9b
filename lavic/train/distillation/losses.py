"""More losses of stage 1: the teacher's token probabilities, and its patch tokens."""

from __future__ import annotations

import torch
from torch import nn

from lavic.model.inputs.label_mask import Batch
from lavic.model.inputs.token_loss import target_logits
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
    """The base model's logits given every patch token, float32 [targets, vocabulary].

    Costs a forward pass over some 2,900 tokens per photo.

    Args:
        model: The model in training; its adapter is disabled.
        text: The prompts with a placeholder for every patch token, and the student's targets.
        views: Of all photos.
        sizes: Of the photos before cutting.
        grids: Of the photos.
    """
    with model.disable_adapter():  # type: ignore[operator]
        return target_logits(model, text, torch.cat(all_tokens(model, views, sizes, grids)))


def top_k_divergence(teacher: torch.Tensor, student: torch.Tensor, top_k: int) -> torch.Tensor:
    """Kullback-Leibler divergence of the student from the teacher over the teacher's likeliest tokens, [targets].

    All other tokens count as one, so that the student is penalized for probability there too.

    Args:
        teacher: Logits, [targets, vocabulary].
        student: Logits, the same shape.
        top_k: Tokens that count by themselves; with all of them it is the exact divergence.
    """
    teacher_logprobs_all, student_logprobs_all = teacher.log_softmax(-1), student.log_softmax(-1)
    teacher_logprobs, tokens = teacher_logprobs_all.topk(min(top_k, teacher.shape[-1]))
    top_k_terms = (teacher_logprobs.exp() * (teacher_logprobs - student_logprobs_all.gather(-1, tokens))).sum(-1)
    if top_k >= teacher.shape[-1]:
        return top_k_terms
    # summed up, not 1 minus the listed ones: in float32 nothing would be left of a small rest
    teacher_rest, student_rest = (
        logprobs.scatter(-1, tokens, float("-inf")).logsumexp(-1)
        for logprobs in (teacher_logprobs_all, student_logprobs_all)
    )
    return top_k_terms + teacher_rest.exp() * (teacher_rest - student_rest)


@torch.no_grad()
def patch_means(model: nn.Module, views: torch.Tensor) -> torch.Tensor:
    """The mean of the base model's patch tokens of each view.

    Args:
        model: The model in training; its adapter is disabled.
        views: [views, 3, size, size]

    Returns:
        float32 [views, d_text]
    """
    with model.disable_adapter():  # type: ignore[operator]
        return patch_tokens(model, views).float().mean(1)


def patch_distance(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean squared error of tokens [views, d_text], relative to the mean square of the teacher's: [views]."""
    return (student.float() - teacher).square().mean(-1) / teacher.square().mean(-1)
