"""Stage 2, recommendation tuning: a batch of lists in, the loss of each token of the right IDs out."""

from __future__ import annotations

import torch
from torch import nn

from lavic.model.config import Kind
from lavic.model.inputs.token_loss import token_losses
from lavic.model.visual_tokens import project
from lavic.train.recommendation.dataset import TuneBatch


class TuneTask(nn.Module):
    """Stage 2: the loss of the right candidate's ID, given stored item tokens; needs no vision tower."""

    trains: Kind = "language"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TuneBatch) -> torch.Tensor:
        """Negative log-likelihood of each target token, float32 [targets]."""
        photos = None if batch.items is None else project(self.model, batch.items)
        return token_losses(self.model, batch.text, photos)
