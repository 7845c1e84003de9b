"""Stage 1, distillation: a batch of photos in, the loss of each token of their descriptions out."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from lavic.model.config import Kind
from lavic.model.inputs.token_loss import target_logits, target_tokens, token_losses
from lavic.model.visual_tokens import all_tokens, cls_tokens, project
from lavic.train.distillation.dataset import PhotoBatch
from lavic.train.distillation.losses import patch_distance, patch_means, teacher_logits, top_k_divergence


class DistillTask(nn.Module):
    """Stage 1, the student: the loss of the description, given one token of each view.

    Args:
        model: With a vision adapter.
        top_k: In training, also match the teacher's probabilities of the k likeliest tokens; 0: do not.
        weight: Share of that in the loss.
        patches: In training, weight of each photo's distance from the teacher's patch tokens, added to its losses.
    """

    trains: Kind = "vision"

    def __init__(self, model: nn.Module, *, top_k: int = 0, weight: float = 0.5, patches: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.top_k, self.weight, self.patches = top_k, weight, patches

    def forward(self, batch: PhotoBatch) -> torch.Tensor:
        """Negative log-likelihood of each target token, float32 [targets]; in training with the terms of `__init__`."""
        views = batch.views
        counts = [1 + rows * columns for rows, columns in batch.grids]
        if list(batch.views_shown) != counts:
            photos = zip(views.split(counts), batch.views_shown, strict=True)
            views = torch.cat([photo[:num_views] for photo, num_views in photos])
        tokens = project(self.model, cls_tokens(self.model, views))
        logits = target_logits(self.model, batch.text, tokens)
        losses = functional.cross_entropy(logits, target_tokens(batch.text), reduction="none")
        if not self.training:
            return losses
        if self.top_k and batch.teacher_text:
            teacher = teacher_logits(self.model, batch.teacher_text, batch.views, batch.sizes, batch.grids)
            losses = (1 - self.weight) * losses + self.weight * top_k_divergence(teacher, logits, self.top_k)
        if self.patches:
            distances = patch_distance(patch_means(self.model, views), tokens).split(batch.views_shown)
            photo_distances = torch.stack([distance.mean() for distance in distances])
            targets = torch.tensor(batch.targets, device=losses.device)
            losses = losses + self.patches * photo_distances.repeat_interleave(targets)
        return losses


class TeacherTask(nn.Module):
    """The loss of the description given every patch token: what stage 1 is compared with. Not trained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PhotoBatch) -> torch.Tensor:
        """Negative log-likelihood of each target token, float32 [targets]."""
        photos = all_tokens(self.model, batch.views, batch.sizes, batch.grids)
        return token_losses(self.model, batch.text, torch.cat(photos))
