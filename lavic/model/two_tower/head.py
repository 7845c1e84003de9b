"""The trained head of the two-tower retriever: a small projection of each tower's frozen features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from lavic.errors import DataError, first_line
from lavic.storage.atomic import atomic_write

_METADATA = "lavic"
_MIN_STD = 1e-3
"""A feature that varies less is treated as constant, and is not scaled to unit variance."""


class Projection(nn.Module):
    """Maps standardized features to a unit vector: a hidden layer, or a linear map if `hidden` is 0.

    Args:
        inputs: Width of the features.
        dim: Width of the vectors.
        hidden: Width of the hidden layer; 0 for none.
        dropout: On the standardized features and the hidden layer, in training.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, inputs: int, dim: int, *, hidden: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.dropout = nn.Dropout(dropout)
        layers: list[nn.Module] = [nn.Linear(inputs, hidden or dim)]
        if hidden:
            layers += [nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim)]
        self.layers = nn.Sequential(*layers)

    def standardize(self, features: torch.Tensor) -> None:
        """Sets mean and deviation from the training features, [n, inputs], whose scales differ greatly."""
        features = features.float()
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0, correction=0).clamp(min=_MIN_STD))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, inputs] -> float32 unit vectors [n, dim]."""
        standardized = (features.float() - self.mean) / self.std
        return functional.normalize(self.layers(self.dropout(standardized)), dim=-1)


class TwoTowerHead(nn.Module):
    """The projections of both towers, and the temperature of their training.

    The score of an item for a conversation is the inner product of their vectors.

    Args:
        query_features: Width of a conversation's features.
        item_features: Width of an item's features.
        dim: Width of the vectors.
        hidden: Width of each projection's hidden layer; 0 for none.
        dropout: In training.
        temperature: Initial value of the learned divisor of the inner products in the loss.
    """

    def __init__(
        self,
        query_features: int,
        item_features: int,
        *,
        dim: int,
        hidden: int = 0,
        dropout: float = 0.0,
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        self.query = Projection(query_features, dim, hidden=hidden, dropout=dropout)
        self.item = Projection(item_features, dim, hidden=hidden, dropout=dropout)
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())


def save_head(head: TwoTowerHead, file: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a head as safetensors, atomically, with `metadata` as JSON (see `read_metadata`)."""
    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    # A single key: safetensors writes several in any order, and equal heads should give equal files.
    atomic_write(file, save(state, {_METADATA: json.dumps(metadata, sort_keys=True)}))


def read_metadata(file: Path) -> dict[str, Any]:
    """The metadata of a head; empty if the file is missing or broken."""
    try:
        with safe_open(file, "pt") as opened:
            return dict(json.loads((opened.metadata() or {}).get(_METADATA, "{}")))
    except (OSError, ValueError, SafetensorError):
        return {}


def load_head(file: Path, **sizes: Any) -> TwoTowerHead:
    """Reads a head that `save_head` wrote; `sizes` are those of `TwoTowerHead`.

    Raises:
        DataError: It cannot be read, has other sizes, or has numbers that are not finite.
    """
    from safetensors.torch import load_file

    head = TwoTowerHead(**sizes)
    try:
        state = load_file(file)
        head.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{file}: not the head of a retriever ({first_line(error)}): copy the bundle again") from None
    if broken := sorted(name for name, value in state.items() if not value.isfinite().all()):
        raise DataError(f"{file}: {broken[0]} has numbers that are not finite: copy the bundle again")
    return head.requires_grad_(False).eval()
