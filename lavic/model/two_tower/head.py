"""The trained part of the two-tower retriever: a small projection on top of each tower's frozen features."""

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
_SMALLEST_STD = 1e-3
"""Of a feature; one that varies less is constant, and is not blown up to unit variance."""


class Projection(nn.Module):
    """Standardized features to a unit vector: one hidden layer, or with `hidden` 0 a linear map."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, inputs: int, dim: int, *, hidden: int = 0, dropout: float = 0.0) -> None:
        """Makes a projection with fresh weights.

        Args:
            inputs: Width of the features.
            dim: Width of the vectors.
            hidden: Width of the hidden layer; 0 for none.
            dropout: On the standardized features and the hidden layer, in training.
        """
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.dropout = nn.Dropout(dropout)
        layers: list[nn.Module] = [nn.Linear(inputs, hidden or dim)]
        if hidden:
            layers += [nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim)]
        self.layers = nn.Sequential(*layers)

    def standardize(self, features: torch.Tensor) -> None:
        """Takes mean and deviation of the training features, [n, inputs]: those of a language model differ by orders of
        magnitude."""
        features = features.float()
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0, correction=0).clamp(min=_SMALLEST_STD))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, inputs] -> float32 unit vectors [n, dim]."""
        standardized = (features.float() - self.mean) / self.std
        return functional.normalize(self.layers(self.dropout(standardized)), dim=-1)


class TwoTowerHead(nn.Module):
    """The projections of both towers, and the temperature that they are trained with.

    A conversation and an item are as near as the inner product of their vectors.
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
        """Makes a head with fresh weights.

        Args:
            query_features: Width of a conversation's features.
            item_features: Width of an item's features.
            dim: Width of the vectors.
            hidden: Width of each projection's hidden layer; 0 for none.
            dropout: In training.
            temperature: Divides the inner products in the loss; learnt from there on.
        """
        super().__init__()
        self.query = Projection(query_features, dim, hidden=hidden, dropout=dropout)
        self.item = Projection(item_features, dim, hidden=hidden, dropout=dropout)
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())


def save_head(head: TwoTowerHead, file: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a head, whole or not at all, as safetensors.

    Args:
        head: The head.
        file: Where to.
        metadata: What it belongs to, as JSON; see `read_metadata`.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    # one key: safetensors writes several in any order, and equal heads are to be equal files
    atomic_write(file, save(state, {_METADATA: json.dumps(metadata, sort_keys=True)}))


def read_metadata(file: Path) -> dict[str, Any]:
    """What a head belongs to; empty where there is no whole file."""
    try:
        with safe_open(file, "pt") as opened:
            return dict(json.loads((opened.metadata() or {}).get(_METADATA, "{}")))
    except (OSError, ValueError, SafetensorError):
        return {}


def load_head(file: Path, **sizes: Any) -> TwoTowerHead:
    """Reads a head.

    Args:
        file: Written by `save_head`.
        sizes: As `TwoTowerHead` takes them.

    Raises:
        DataError: It cannot be read, has other sizes, or holds numbers that are not finite.
    """
    from safetensors.torch import load_file

    head = TwoTowerHead(**sizes)
    try:
        state = load_file(file)
        head.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{file}: not a retriever's head ({first_line(error)}): copy the bundle again") from None
    if broken := sorted(name for name, value in state.items() if not value.isfinite().all()):
        raise DataError(f"{file}: {broken[0]} holds numbers that are not finite: copy the bundle again")
    return head.requires_grad_(False).eval()
